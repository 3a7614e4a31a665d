"""Writing a cache of packed rows: a mixture through SeqIO once, in shards, by several processes.

The work is cut into epochs and each epoch into slices (see `slices`); a slice is a shard, one file
of the cache. What a shard holds depends on its number alone, so the files are the same however
many processes write them, and whatever was killed on the way. A finished shard has its file in
place and a note in `.work`; the manifest, written last, says that all are there.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained, is_remote
from cosmo.engine.base.progress import SharedProgress
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.data import datasets, seqio_reader, slices, workers
from cosmo.engine.data.packing import Counts, Packer
from cosmo.engine.data.rows import MANIFEST, VERSION, Cache, RowFormat, fingerprint, shard_name

log = logging.getLogger(__name__)

WORK, PLAN = ".work", "plan.json"
MOST_UNKNOWN = 0.01  # of a task's pieces
SHARDS, SHARD_EXAMPLES = 16, 20_000  # shards an epoch at most, examples in one at least
EVERY_SECONDS = 0.5  # between words on progress


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What is cached: the dataset as training would read it, and the vocabulary of its tokens.

    `apart`: texts that the share of unknown pieces leaves out, such as separators.
    """

    dataset: datasets.DatasetConfig
    vocabulary: Vocabulary
    apart: tuple[str, ...] = ()

    @property
    def format(self) -> RowFormat:
        """Of a row: as short integers as hold the vocabulary."""
        lengths = self.dataset.task_feature_lengths
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
    worker: Sequence[str] | None = None,
) -> Cache:
    """Write the cache at `output`, or what of it an earlier, killed command has not finished.

    `shards_per_epoch` None: by the number of examples. `recipe` is kept with the cache, which goes
    on only with the same. `worker` is the command of a process that calls `work` with the same
    config and output; without it, all is done in this one. Raises UserError for other settings
    than the output was begun with, for an empty task, and for more than MOST_UNKNOWN unknown
    pieces in a task's text unless `allow_unknown`.
    """
    for flag, number in (("epochs", epochs), ("processes", processes)):
        if number < 1:
            raise UserError(f"--{flag}={number}; it must be at least 1")
    if shards_per_epoch is not None and shards_per_epoch < 1:
        raise UserError(f"--shards_per_epoch={shards_per_epoch}; it must be at least 1")
    folder = Path(output)
    _check_free(folder, output, overwrite)
    settings = _settings(config, epochs, shards_per_epoch, recipe)
    plan = _read_plan(folder)
    if plan is not None:
        _check_settings(folder, plan["settings"], settings)
        _check_sources(folder, config, plan["tasks"])
    with explained(folder, "give another --output"):
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        (folder / WORK / "partial-probe").write_text("")
        for stale in (folder / WORK).glob("partial-*"):
            stale.unlink(missing_ok=True)
    if plan is None:
        plan = {"settings": settings, **_plan(config, shards_per_epoch, allow_unknown)}
        write_atomic(folder / WORK / PLAN, json.dumps(plan, indent=1))
    number = epochs * plan["shards_per_epoch"]
    done = {shard: note for shard in range(number) if (note := _finished(folder, shard, number))}
    todo = [shard for shard in range(number) if shard not in done]
    if todo:
        log.info("%d of %d shards to write, by %d process(es)", len(todo), number, processes)
        examples = sum(entry["examples"] * entry["times"] for entry in plan["tasks"].values())
        before = sum(sum(c["examples"] for c in note["tasks"].values()) for note in done.values())
        progress = SharedProgress(round(examples * epochs), before, "example")
        try:
            if worker is None or min(processes, len(todo)) == 1:
                for shard in todo:
                    _write_shard(config, folder, plan, shard, 1, progress.add)
            else:
                workers.run(worker, todo, processes, progress.add)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "finished shards are kept; the same command goes on from there"
            ) from None
        finally:
            progress.finish()
    return _finish(folder, plan, config, number, allow_unknown)


def work(config: CacheConfig, output: str, processes: int) -> None:
    """A worker process, one of `processes`: writes the shards that it is told to."""
    folder = Path(output)
    plan = _read_plan(folder)
    seqio_reader.resolve_name(config.dataset)  # registers the tasks
    workers.serve(lambda shard, more: _write_shard(config, folder, plan, shard, processes, more))


def _check_free(folder: Path, output: str, overwrite: bool) -> None:
    """Raise UserError if the folder holds anything but a cache; `overwrite` removes a cache."""
    if is_remote(output):
        raise UserError(f"--output={output}: a cache is written to a local or mounted folder")
    if overwrite:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        for path in [*folder.glob("rows-*.arrayrecord"), folder / MANIFEST]:
            path.unlink(missing_ok=True)
    elif folder.exists() and not (folder / MANIFEST).exists():
        with explained(folder, "give another --output"):
            others = [path.name for path in folder.iterdir() if path.name != WORK]
        if others and not (folder / WORK / PLAN).exists():
            raise UserError(
                f"--output={output} holds {others[0]} and no cache; give another folder, or "
                "--overwrite to replace a cache's files in it"
            )


def _settings(config: CacheConfig, epochs: int, shards_per_epoch, recipe: str) -> dict[str, Any]:
    """All that the rows depend on."""
    dataset = config.dataset
    return {
        "version": VERSION,
        "name": seqio_reader.resolve_name(dataset),
        "split": dataset.split,
        "epochs": epochs,
        "shards_per_epoch": shards_per_epoch,
        "seed": dataset.seed or 0,
        "shuffle": dataset.shuffle,
        "use_cached": dataset.use_cached,
        "format": dataclasses.asdict(config.format),
        "vocabulary": config.vocabulary.fingerprint,
        "recipe": recipe.splitlines(),
    }


def _check_settings(folder: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in json.loads(json.dumps(wanted)).items():
        theirs = kept.get(name)
        if theirs == value:
            continue
        if name == "recipe":
            gone = [line for line in theirs if line not in value]
            new = [line for line in value if line not in theirs]
            theirs, value = " ".join(gone[:3]), " ".join(new[:3])
        raise UserError(
            f"{folder} was begun with other settings: {name} is {theirs!r} there and {value!r} "
            "here; give another --output, or --overwrite"
        )


def _check_sources(folder: Path, config: CacheConfig, tasks: Mapping[str, Any]) -> None:
    """Raise UserError if a task's source has another number of examples than it had."""
    for name, entry in tasks.items():
        size = slices.count(config.dataset, name)
        if size != entry["source"]:
            raise UserError(
                f"the source of task {name!r} has {size:,} examples; it had {entry['source']:,} "
                f"when {folder} was begun: give another --output, or --overwrite"
            )


def _read_plan(folder: Path) -> dict[str, Any] | None:
    """What was planned: kept in the manifest of a finished cache, in `.work` of another."""
    for path in (folder / MANIFEST, folder / WORK / PLAN):
        with contextlib.suppress(FileNotFoundError):
            try:
                kept = json.loads(path.read_text())
                return {name: kept[name] for name in ("settings", "tasks", "shards_per_epoch")}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} cannot be read ({error}); --overwrite") from error
    return None


def _plan(config: CacheConfig, shards_per_epoch: int | None, allow_unknown: bool) -> dict[str, Any]:
    """How often each task is read in an epoch, and in how many shards an epoch lies."""
    dataset, began = config.dataset, time.monotonic()
    rates = slices.rates(dataset)
    tasks: dict[str, dict[str, Any]] = {}
    for name, rate in rates.items():
        size = slices.count(dataset, name)
        if not size:
            raise UserError(f"task {name!r} has no examples in split {dataset.split!r}")
        tasks[name] = {"rate": rate, "source": size, "examples": size, "times": 1.0}
        log.info("%s: %s examples", name, f"{size:,}")
    for name, entry in tasks.items():
        counts = _counts(config, [name])
        part = slices.Slice(0, 0, 1, dataset.seed or 0)
        for batch in slices.read(dataset, {name: entry}, part, slices.PROBE):
            counts.add(batch[0], batch[1])
        sums, looked = counts.sums[name], min(slices.PROBE, entry["examples"])
        if not sums["examples"]:
            raise UserError(
                f"task {name!r} has no examples in split {dataset.split!r}: its preprocessors "
                f"leave none of the first {looked}"
            )
        _check_unknown(name, sums, config, allow_unknown)
        # Preprocessors may make several examples of one, or none.
        entry["examples"] = round(entry["examples"] * sums["examples"] / looked)
    times = slices.times_an_epoch(rates, {name: e["examples"] for name, e in tasks.items()})
    for name, entry in tasks.items():
        entry["times"] = times[name]
        say = log.warning if times[name] > slices.MANY else log.info
        say("an epoch reads %s %.4g times (rate %.6g)", name, times[name], entry["rate"])
    total = sum(entry["examples"] * entry["times"] for entry in tasks.values())
    shards = shards_per_epoch or min(SHARDS, max(1, int(total // SHARD_EXAMPLES)))
    log.info("planned in %.0f s: %d shards an epoch", time.monotonic() - began, shards)
    return {"tasks": tasks, "shards_per_epoch": shards}


def _counts(config: CacheConfig, tasks: Sequence[str]) -> Counts:
    vocabulary = config.vocabulary
    return Counts(
        tasks,
        2**16 if config.format.dtype == "uint16" else 2**31,
        vocabulary.eos_id,
        vocabulary.unk_id,
        [vocabulary.encode(text) for text in config.apart],
    )


def _check_unknown(
    task: str, sums: Mapping[str, int], config: CacheConfig, allow_unknown: bool
) -> None:
    share = sums["unknown"] / max(sums["pieces"], 1)
    if share > MOST_UNKNOWN and not allow_unknown:
        raise UserError(
            f"{share:.1%} of the pieces of task {task!r} are unknown to the vocabulary "
            f"{config.vocabulary.path} ({sums['unknown']:,} of {sums['pieces']:,}, separators "
            "apart): is it this text's vocabulary? --allow_unknown caches "
            "it all the same",
            setting="VOCABULARY_PATH",
        )


def _note(folder: Path, shard: int) -> Path:
    return folder / WORK / f"done-{shard:05d}.json"


def _finished(folder: Path, shard: int, number: int) -> dict[str, Any] | None:
    """The note on a shard whose file is whole; None: it is to be written."""
    note = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        note = json.loads(_note(folder, shard).read_text())
    if note is None:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, IndexError):
            note = json.loads((folder / MANIFEST).read_text())["shards"][shard]
    path = folder / shard_name(shard, number)
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
    folder: Path,
    plan: Mapping[str, Any],
    shard: int,
    processes: int,
    more: Callable[[int], None],
) -> None:
    """Write a shard's file and its note; `more` is called with numbers of examples."""
    from array_record.python import array_record_module

    per_epoch, epochs = plan["shards_per_epoch"], plan["settings"]["epochs"]
    epoch, index = divmod(shard, per_epoch)
    part = slices.Slice(epoch, index, per_epoch, plan["settings"]["seed"], processes)
    counts = _counts(config, list(plan["tasks"]))
    packer = Packer(config.format)
    path = folder / shard_name(shard, epochs * per_epoch)
    partial = folder / WORK / f"partial-{uuid.uuid4().hex}"
    rows, pending, told = 0, 0, time.monotonic()
    try:
        file = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
        for task, sides, names in slices.read(config.dataset, plan["tasks"], part):
            counts.add(task, sides)
            inputs, targets = (_split(*sides[name]) for name in ("inputs", "targets"))
            for example in zip(inputs, targets, names, strict=True):
                for record in packer.add(*example):
                    file.write(record)
                    rows += 1
            pending += len(names)
            if time.monotonic() - told > EVERY_SECONDS:
                more(pending)
                pending, told = 0, time.monotonic()
        for record in packer.finish():
            file.write(record)
            rows += 1
        file.close()
        if array_record_module.ArrayRecordReader(str(partial)).num_records() != rows:
            raise UserError(f"cannot write {path}: it does not hold what was written; a full disk?")
        note = {
            "file": path.name,
            "epoch": epoch,
            "rows": rows,
            "bytes": partial.stat().st_size,
            "sha256": _sha256(partial),
            "seed": part.draws,
            "tasks": {name: dict(sums) for name, sums in counts.sums.items()},
        }
        partial.replace(path)
    except (RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    write_atomic(_note(folder, shard), json.dumps(note))
    more(pending)


def _split(tokens, lengths):
    """The examples of a flat vector."""
    stops = lengths.cumsum().tolist()
    return [tokens[a:b] for a, b in zip([0, *stops], stops, strict=False)]


def _finish(
    folder: Path, plan: Mapping[str, Any], config: CacheConfig, number: int, allow_unknown: bool
) -> Cache:
    """Write the manifest, if all shards are there and their text is known to the vocabulary."""
    old = {}
    if (folder / MANIFEST).exists():
        old = dict(enumerate(json.loads((folder / MANIFEST).read_text())["shards"]))
    shards = []
    for shard in range(number):
        path = _note(folder, shard)
        shards.append(json.loads(path.read_text()) if path.exists() else old[shard])
    tasks = {}
    for name, entry in plan["tasks"].items():
        sums = sum((Counter(shard["tasks"][name]) for shard in shards), Counter())
        if not sums["examples"]:
            raise UserError(f"task {name!r} has no examples in split {config.dataset.split!r}")
        _check_unknown(name, sums, config, allow_unknown)
        unknown = sums["unknown"] / max(sums["pieces"], 1)
        tasks[name] = {**entry, "cached": dict(sums), "unknown_share": unknown}
    totals = sum((Counter(entry["cached"]) for entry in tasks.values()), Counter())
    settings = plan["settings"]
    manifest = {
        "version": VERSION,
        "name": settings["name"],
        "split": settings["split"],
        "epochs": settings["epochs"],
        "seeds": [
            slices.epoch_seed(settings["seed"], epoch) for epoch in range(settings["epochs"])
        ],
        "rows": sum(shard["rows"] for shard in shards),
        "format": settings["format"],
        "features": config.format.feature_names,
        "vocabulary": {
            "path": str(config.vocabulary.path),
            "size": config.vocabulary.size,
            "fingerprint": config.vocabulary.fingerprint,
        },
        "totals": {
            "examples": totals["examples"],
            "input_tokens": totals["inputs_tokens"],
            "target_tokens": totals["targets_tokens"],
        },
        "settings": settings,
        "tasks": tasks,
        "shards_per_epoch": plan["shards_per_epoch"],
        "shards": shards,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return Cache(str(folder))
