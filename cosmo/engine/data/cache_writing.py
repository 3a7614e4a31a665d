"""Write a cache of packed rows: a mixture read through SeqIO once, in shards, by several processes.

An epoch is cut into slices (see `epoch_slices`). A slice is a shard, which is one file of the
cache. The content of a shard depends on its number alone, so the files are the same for any number
of processes and after any kill. The manifest is written last, when all shards are in place.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmo.engine.base import worker_processes
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained, is_remote
from cosmo.engine.base.progress import Progress
from cosmo.engine.base.vocabulary import Vocabulary, identity
from cosmo.engine.base.work_units import WorkUnits, read_json
from cosmo.engine.data import datasets, epoch_slices, seqio_reader
from cosmo.engine.data.cache_reading import (
    MANIFEST,
    VERSION,
    WORK,
    Cache,
    RowFormat,
    fingerprint,
    shard_name,
)
from cosmo.engine.data.packing import Counts, Packer

log = logging.getLogger(__name__)

# Far more than a text leaves with its own vocabulary, far less than with another language's.
MAX_UNKNOWN_SHARE = 0.01
# By default an epoch has up to 16 shards, for as many processes. Each has 20,000 examples or more,
# because starting to read a slice takes seconds.
MAX_SHARDS, MIN_SHARD_EXAMPLES = 16, 20_000
PROBE_EXAMPLES = 1000  # read of each task before the work begins
MANY_TIMES = 10  # an epoch that reads a task so often has probably the wrong rates
REPORT_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Settings of a cache: the dataset as training would read it, and the vocabulary of its tokens.

    `apart` are texts, such as separators, that do not count in the share of unknown pieces.
    """

    dataset: datasets.DatasetConfig
    vocabulary: Vocabulary
    apart: tuple[str, ...] = ()

    @property
    def format(self) -> RowFormat:
        """Return the format of a row, in the shortest integers that hold the vocabulary."""
        lengths = self.dataset.task_feature_lengths
        # T5's 32,128 pieces fit 16 bits: half the bytes of int32.
        dtype = "uint16" if self.vocabulary.size <= 2**16 else "int32"
        return RowFormat(lengths["inputs"], lengths["targets"], self.dataset.pack, dtype)


def write_cache(
    config: CacheConfig,
    output: str,
    *,
    epochs: int = 1,
    processes: int = 1,
    shards_per_epoch: int | None = None,
    overwrite: bool = False,
    allow_unknown: bool = False,
    recipe: str = "",
) -> Cache:
    """Write the cache at `output`, or the shards that an earlier command has not finished.

    Args:
        config: with more than one process, it is pickled.
        output: a local folder, new or with a cache.
        epochs: times that the mixture is read.
        processes: worker processes at once; one works in this process.
        shards_per_epoch: None chooses by the number of examples.
        overwrite: whether to remove the cache that is there first.
        allow_unknown: whether to cache text with many pieces unknown to the vocabulary.
        recipe: text kept with the cache; only a command of the same recipe continues it.

    Raises UserError if the output was begun with other settings or if a task is empty. Raises it
    too if more than MAX_UNKNOWN_SHARE of a task's pieces are unknown.
    """
    given = {"epochs": epochs, "processes": processes, "shards_per_epoch": shards_per_epoch}
    for name, number in given.items():
        if number is not None and number < 1:
            raise UserError(f"{name}={number}; it must be at least 1", setting=name)
    # ArrayRecord writes to a file system, and a finished file is put in place by its rename.
    if is_remote(output):
        raise UserError(
            f"{output}: a cache is written to a local or mounted folder", setting="output"
        )
    folder = Path(output)
    units = WorkUnits(output, folder / WORK)
    # Before anything is removed: an unknown task must not cost a cache.
    settings = _settings(config, epochs, shards_per_epoch, recipe)
    if overwrite:
        units.remove([*folder.glob("rows-*.arrayrecord"), folder / MANIFEST])
    manifest = read_json(folder / MANIFEST)
    plan = manifest or units.read_plan()
    if plan is None:
        _check_free(folder, overwrite)
    else:
        kept = plan["settings"]
        units.check_settings(
            {**kept, "recipe": _bindings(kept["recipe"])},
            {**settings, "recipe": _bindings(settings["recipe"])},
        )
        # A corpus that grew would fill the missing shards with other rows than the plan's.
        _check_sources(folder, config, plan["tasks"])
    units.prepare()
    units.remove_partial_files()
    if plan is None:
        plan = {"settings": settings, **_plan(config, shards_per_epoch, allow_unknown)}
        units.begin(plan)
    number = epochs * plan["shards_per_epoch"]
    notes = [_finished(folder, units, shard, number, manifest) for shard in range(number)]
    todo = [shard for shard, note in enumerate(notes) if note is None]
    if todo:
        # A worker without a shard would load TensorFlow for nothing.
        processes = min(processes, len(todo))
        log.info("%d of %d shards to write, by %d process(es)", len(todo), number, processes)
        done = sum(task["examples"] for note in notes if note for task in note["tasks"].values())
        progress = Progress(round(_epoch_examples(plan) * epochs), done, unit="example", late=True)
        write = functools.partial(_write_shard, config, units, plan, processes)
        try:
            if processes == 1:  # a worker would import TensorFlow a second time
                for shard in todo:
                    write(shard, progress.add)
            else:
                worker_processes.run(
                    write, todo, processes, progress.add, kept="finished shards are kept"
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "finished shards are kept; the same command continues"
            ) from None
        finally:
            progress.finish()
    # Workers share no memory with this process: their notes are in files.
    notes = [note or units.note(shard) for shard, note in enumerate(notes)]
    _write_manifest(folder, plan, config, notes, allow_unknown)
    units.remove()
    # Opened as training opens it, which checks that every shard is there.
    return Cache(str(folder))


def _check_free(folder: Path, overwrite: bool) -> None:
    """Raise UserError if a folder without a cache holds other files."""
    with explained(folder, "give another output", setting="output"):
        others = [path.name for path in folder.iterdir()] if folder.exists() else []
    others = [name for name in others if name != WORK]
    if others and not overwrite:
        raise UserError(
            f"{folder} holds {others[0]} and no cache; give another folder, or overwrite a cache's "
            "files in it",
            setting=("output", "overwrite"),
        )


def _settings(
    config: CacheConfig, epochs: int, shards_per_epoch: int | None, recipe: str
) -> dict[str, Any]:
    """Return all settings that the rows depend on, for the manifest."""
    dataset = config.dataset
    return {
        "version": VERSION,
        "name": seqio_reader.resolve_name(dataset),
        "split": dataset.split,
        "epochs": epochs,
        "shards_per_epoch": shards_per_epoch,
        "seed": dataset.seed or 0,  # None draws at random, and a cache has to be repeatable
        "shuffle": dataset.shuffle,
        "use_cached": dataset.use_cached,
        "format": dataclasses.asdict(config.format),
        "vocabulary": config.vocabulary.fingerprint,
        # A line an item, so that an error shows the lines that differ.
        "recipe": recipe.splitlines(),
    }


# A module's name before a dot, outside of quotes.
_MODULE = re.compile(r"('[^']*')|\b[a-z]\w*\.(?=[A-Za-z_])")


def _bindings(recipe: Sequence[str]) -> list[str]:
    """Return the lines of a gin file without imports, comments and names of modules."""
    # Modules may be renamed between the command that began a cache and the one that repairs it.
    lines = [line for line in recipe if not line.startswith(("from ", "import ", "#"))]
    return [_MODULE.sub(r"\1", line) for line in lines]


def _check_sources(folder: Path, config: CacheConfig, tasks: Mapping[str, Any]) -> None:
    """Raise UserError if a task's source has another number of examples than it had."""
    # The number only: a checksum of the corpus would take as long as reading it.
    for name, entry in tasks.items():
        size = epoch_slices.count_examples(config.dataset, name)
        if size != entry["source"]:
            raise UserError(
                f"the source of task {name!r} has {size:,} examples; it had {entry['source']:,} "
                f"when {folder} was begun: give another output, or overwrite it",
                setting=("output", "overwrite"),
            )


def _plan(config: CacheConfig, shards_per_epoch: int | None, allow_unknown: bool) -> dict[str, Any]:
    """Return how often an epoch reads each task, and the number of shards of an epoch."""
    dataset, began = config.dataset, time.monotonic()
    rates = epoch_slices.task_rates(dataset)
    tasks: dict[str, dict[str, Any]] = {}
    # All sources are counted before the first is read: a path that is wrong is found at once.
    for name, rate in rates.items():
        size = epoch_slices.count_examples(dataset, name)
        _check_not_empty(name, size, config)
        tasks[name] = {"rate": rate, "source": size, "examples": size, "times": 1.0}
        log.info("%s: %s examples", name, f"{size:,}")
    # A part of each task is read now: a wrong vocabulary is then found in seconds, not hours.
    for name, entry in tasks.items():
        counts = _counts(config, [name])
        part = epoch_slices.Slice(0, 0, 1, dataset.seed or 0)
        for batch in epoch_slices.read_slice(dataset, {name: entry}, part, PROBE_EXAMPLES):
            counts.add(batch[0], batch[1])
        sums, read = counts.sums[name], min(PROBE_EXAMPLES, entry["examples"])
        _check_not_empty(name, sums["examples"], config, f": its preprocessors drop all of {read}")
        _check_unknown(name, sums, config, allow_unknown)
        # Rates are of examples after preprocessing, which may make several of one, or none.
        entry["examples"] = round(entry["examples"] * sums["examples"] / read)
    times = epoch_slices.times_an_epoch(rates, {name: e["examples"] for name, e in tasks.items()})
    for name, entry in tasks.items():
        entry["times"] = times[name]
        # Rates of another mixture may make nearly all rows of one small task.
        level = logging.WARNING if times[name] > MANY_TIMES else logging.INFO
        log.log(level, "an epoch reads %s %.4g times (rate %.6g)", name, times[name], entry["rate"])
    total = int(_epoch_examples({"tasks": tasks}))
    shards = shards_per_epoch or min(MAX_SHARDS, max(1, total // MIN_SHARD_EXAMPLES))
    log.info("planned in %.0f s: %d shards an epoch", time.monotonic() - began, shards)
    return {"tasks": tasks, "shards_per_epoch": shards}


def _epoch_examples(plan: Mapping[str, Any]) -> float:
    return sum(entry["examples"] * entry["times"] for entry in plan["tasks"].values())


def _counts(config: CacheConfig, tasks: Sequence[str]) -> Counts:
    vocabulary = config.vocabulary
    return Counts(
        tasks,
        2**16 if config.format.dtype == "uint16" else 2**31,
        vocabulary.eos_id,
        vocabulary.unk_id,
        [vocabulary.encode(text) for text in config.apart],
    )


def _check_not_empty(task: str, examples: int, config: CacheConfig, reason: str = "") -> None:
    if not examples:
        raise UserError(f"task {task!r} has no examples in split {config.dataset.split!r}{reason}")


def _unknown_share(sums: Mapping[str, int]) -> float:
    return sums["unknown"] / max(sums["pieces"], 1)


def _check_unknown(
    task: str, sums: Mapping[str, int], config: CacheConfig, allow_unknown: bool
) -> None:
    share = _unknown_share(sums)
    if share > MAX_UNKNOWN_SHARE and not allow_unknown:
        raise UserError(
            f"{share:.1%} of the pieces of task {task!r} are unknown to the vocabulary "
            f"{config.vocabulary.path} ({sums['unknown']:,} of {sums['pieces']:,}, without "
            "separators): give the vocabulary of this text, or allow unknown pieces",
            setting=("VOCABULARY_PATH", "allow_unknown"),
        )


def _finished(
    folder: Path, units: WorkUnits, shard: int, number: int, manifest: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the note of a shard whose file is whole, or None if it has to be written."""
    note = units.note(shard)
    if note is None and manifest is not None:
        # A finished cache has no notes any more: its manifest has them.
        note = manifest["shards"][shard]
    path = folder / shard_name(shard, number)
    # The size first, because reading a shard for its checksum takes longer.
    if note is None or not path.exists() or path.stat().st_size != note["bytes"]:
        return None
    if _sha256(path) != note["sha256"]:
        log.warning("%s is damaged and is written again", path)
        return None
    return note


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_shard(
    config: CacheConfig,
    units: WorkUnits,
    plan: Mapping[str, Any],
    processes: int,
    shard: int,
    report: worker_processes.Report,
) -> None:
    """Write a shard's file and its note; call `report` with the numbers of examples read."""
    from array_record.python import array_record_module

    seqio_reader.resolve_name(config.dataset)  # registers the tasks, which a new process lacks
    per_epoch = plan["shards_per_epoch"]
    epoch, index = divmod(shard, per_epoch)
    part = epoch_slices.Slice(epoch, index, per_epoch, plan["settings"]["seed"], processes)
    counts = _counts(config, list(plan["tasks"]))
    name = shard_name(shard, plan["settings"]["epochs"] * per_epoch)
    path = units.folder.parent / name
    rows = 0
    try:
        with units.finishing(shard, path) as (partial, note):
            # Groups of one record: training reads rows in a random order.
            file = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
            for record in _packed_rows(config, plan, part, counts, report):
                file.write(record)
                rows += 1
            file.close()
            # The writer reports no error of a full disk.
            if array_record_module.ArrayRecordReader(str(partial)).num_records() != rows:
                raise UserError(f"cannot write {path}: rows are missing in it; a full disk?")
            note |= {
                "file": name,
                "epoch": epoch,
                "rows": rows,
                "bytes": partial.stat().st_size,
                "sha256": _sha256(partial),
                "seed": part.draws,
                "tasks": {name: dict(sums) for name, sums in counts.sums.items()},
            }
    except RuntimeError as error:  # of ArrayRecord's C++
        raise UserError(f"cannot write {path}: {error}") from error


def _packed_rows(
    config: CacheConfig,
    plan: Mapping[str, Any],
    part: epoch_slices.Slice,
    counts: Counts,
    report: worker_processes.Report,
) -> Iterator[bytes]:
    """Yield the records of a slice, and count its examples in `counts`."""
    packer = Packer(config.format)
    read, reported = 0, time.monotonic()
    for task, sides, names in epoch_slices.read_slice(config.dataset, plan["tasks"], part):
        counts.add(task, sides)
        inputs, targets = (_split(*sides[name]) for name in ("inputs", "targets"))
        for example in zip(inputs, targets, names, strict=True):
            yield from packer.add(*example)
        read += len(names)
        # Seldom: each report crosses to the parent process.
        if time.monotonic() - reported > REPORT_SECONDS:
            report(read)
            read, reported = 0, time.monotonic()
    yield from packer.finish()  # the only row of a shard that may be half empty
    report(read)


def _split(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Return the examples of a flat vector."""
    return np.split(tokens, lengths.cumsum()[:-1])


def _write_manifest(
    folder: Path,
    plan: Mapping[str, Any],
    config: CacheConfig,
    notes: Sequence[Mapping[str, Any]],
    allow_unknown: bool,
) -> None:
    """Write the manifest. Raises UserError if a task's text is unknown to the vocabulary."""
    tasks = {}
    for name, entry in plan["tasks"].items():
        sums = sum((Counter(note["tasks"][name]) for note in notes), Counter())
        _check_not_empty(name, sums["examples"], config)
        # Once more: the first examples of the plan may have been unlike the others.
        _check_unknown(name, sums, config, allow_unknown)
        tasks[name] = {**entry, "cached": dict(sums), "unknown_share": _unknown_share(sums)}
    totals = sum((Counter(entry["cached"]) for entry in tasks.values()), Counter())
    settings = plan["settings"]
    manifest = {
        "version": VERSION,
        "name": settings["name"],
        "split": settings["split"],
        "epochs": settings["epochs"],
        "seeds": [
            epoch_slices.epoch_seed(settings["seed"], epoch) for epoch in range(settings["epochs"])
        ],
        "rows": sum(note["rows"] for note in notes),
        "format": settings["format"],
        "features": config.format.feature_names,
        "vocabulary": identity(config.vocabulary),
        "totals": {
            "examples": totals["examples"],
            "input_tokens": totals["inputs_tokens"],
            "target_tokens": totals["targets_tokens"],
        },
        "settings": settings,
        "tasks": tasks,
        "shards_per_epoch": plan["shards_per_epoch"],
        "shards": list(notes),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
