"""Write answers into output shards; a kill costs at most the answers since the last save.

A shard has a contiguous range of the input's records. Its answers are saved in parts, each a small
file in a hidden folder beside the output. When all parts of a shard are there, they are joined into
the shard's file and removed. Several processes may share one output.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from etils import epath

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained
from cosmo.engine.base.work_units import WorkUnits
from cosmo.engine.infer.record_sources import Rejected, Span

# A folder whose name ends so is a mistake for a file that we do not write.
_FILE_SUFFIXES = (".csv", ".gz", ".json", ".ndjson", ".parquet", ".tsv", ".txt")


class OutputFiles(NamedTuple):
    """The files of a run: shards, all rejected records, and the unfinished work.

    A unit of the work is a shard.
    """

    shards: tuple[epath.Path, ...]
    rejected: epath.Path
    units: WorkUnits


def output_files(output: str, num_shards: int) -> OutputFiles:
    """Return the files of an output: one FILE.jsonl, or a folder of `predictions-*.jsonl` shards.

    Raises UserError for the name of another kind of file.
    """
    if not output:  # such as --output=$OUT where OUT is not set: it would be the working folder
        raise UserError("the output's path is empty", setting="output")
    path = epath.Path(output)
    if path.suffix == ".jsonl":
        if num_shards > 1:
            raise UserError(
                f"num_shards={num_shards} files do not fit in {output}; give a folder",
                setting=("num_shards", "output"),
            )
        return OutputFiles(
            (path,), path.with_name(f"{path.name}.rejected.jsonl"), _units(output, path)
        )
    # Else `--output=answers.csv` would quietly become a folder of that name.
    if path.suffix in _FILE_SUFFIXES and not path.is_dir():
        raise UserError(
            f"{output}: {path.suffix} files are not written; give FILE.jsonl or a folder",
            setting="output",
        )
    shards = _shard_paths(path / "predictions", num_shards)
    return OutputFiles(shards, path / "rejected.jsonl", _units(output, path / "predictions"))


def task_files(folder: str, name: str, num_shards: int) -> OutputFiles:
    """Return the files of a SeqIO task: `NAME.jsonl`, or `NAME-00000-of-0000N.jsonl`."""
    path = epath.Path(folder) / name
    file = path.with_name(f"{name}.jsonl")
    shards = (file,) if num_shards == 1 else _shard_paths(path, num_shards)
    rejected = path.with_name(f"{name}-rejected.jsonl")
    return OutputFiles(shards, rejected, _units(f"{folder}/{name}", file))


def _shard_paths(stem: epath.Path, num_shards: int) -> tuple[epath.Path, ...]:
    return tuple(
        stem.with_name(f"{stem.name}-{shard:05d}-of-{num_shards:05d}.jsonl")
        for shard in range(num_shards)
    )


def _units(output: str, path: epath.Path) -> WorkUnits:
    return WorkUnits(output, path.with_name(f".{path.name}.work"), "manifest.json")


def parse_shards(text: str | None, num_shards: int) -> list[int]:
    """Return the shards that a text such as "0-3" or "2,5" names, ascending; None: all."""
    if num_shards < 1:
        raise UserError(f"num_shards={num_shards}; it must be at least 1", setting="num_shards")
    if text is None:
        return list(range(num_shards))
    chosen: set[int] = set()
    for item in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", item)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(
                f"shards={text}: give numbers and ranges, such as 0-3 or 2,5", setting="shards"
            )
        if last >= num_shards:
            raise UserError(
                f"shards={text}: there are shards 0 to {num_shards - 1}",
                setting=("shards", "num_shards"),
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def part_spans(count: int, num_shards: int, size: int, chosen: Iterable[int]) -> list[Span]:
    """Return the spans of the parts, of `size` records, of the chosen shards.

    The shards divide `count` records as evenly as possible.
    """
    return [
        Span(shard, start, min(start + size, last))
        for shard in chosen
        for first, last in [(count * shard // num_shards, count * (shard + 1) // num_shards)]
        for start in range(first, last, size)
    ]


def prepare(
    files: OutputFiles, settings: Mapping[str, Any], part_size: int, *, overwrite: bool
) -> int:
    """Create the folders. Return the part size of the run that continues, else `part_size`.

    Raises UserError if the output cannot be written to, if it was made with other settings, or if
    it was not made by this module. With `overwrite` only the first of these is an error.
    """
    if files.shards[0].is_dir():  # before hours of work: a file cannot replace a folder
        raise UserError(f"cannot write {files.shards[0]}: it is a folder", setting="output")
    files.units.prepare()
    if overwrite:
        return part_size
    plan = files.units.read_plan(settings)
    if plan is not None:
        return plan["window"]  # the part size, by the name of its flag
    # A file without a manifest may be the user's own.
    there = next((path for path in (*files.shards, files.rejected) if path.exists()), None)
    if there is not None:
        raise UserError(
            f"{there} exists and no run made it that could continue; give another output, or "
            "overwrite it",
            setting=("output", "overwrite"),
        )
    return part_size


def begin(
    files: OutputFiles, settings: Mapping[str, Any], part_size: int, *, overwrite: bool
) -> None:
    """Write the manifest unless it is there; `overwrite` removes an earlier run's files first."""
    if overwrite:
        _remove(files)
        files.units.prepare()
    # Names alone, because the folder may be moved or copied.
    names = [path.name for path in (*files.shards, files.rejected)]
    files.units.begin({"settings": settings, "window": part_size, "files": names})


def check_settings(files: OutputFiles, settings: Mapping[str, Any]) -> None:
    """Raise UserError if another command has meanwhile begun the output with other settings."""
    if files.units.read_plan(settings) is None:
        raise _removed(files.units.plan_path)


def _removed(path: Any) -> UserError:
    return UserError(f"{path} was removed meanwhile; run the same command again")


def _remove(files: OutputFiles) -> None:
    """Remove a run's files, whatever its number of shards."""
    try:
        listed = (files.units.read_plan() or {"files": []})["files"]
    except UserError:
        listed = []  # a damaged manifest
    # By name, beside the work folder, because the output may have been copied or moved since.
    here = [files.units.folder.parent / epath.Path(name).name for name in listed]
    files.units.remove((*here, *files.shards, files.rejected))


def missing(files: OutputFiles, spans: Sequence[Span]) -> list[bool]:
    """Return for each span whether neither its part nor its shard exists."""
    with explained(files.units.folder):
        parts = {path.name for path in files.units.folder.iterdir()}
        # A shard's file means that its parts were joined, and removed.
        done = {shard for shard in {s.shard for s in spans} if files.shards[shard].exists()}
    return [span.shard not in done and _part_path(files, span).name not in parts for span in spans]


def _part_path(files: OutputFiles, span: Span) -> epath.Path:
    # Padded numbers, so that names are sorted as their records are.
    return files.units.folder / f"part-{span.shard:05d}-{span.start:012d}-{span.stop:012d}.jsonl"


def _work_files(files: OutputFiles, prefix: str) -> list[epath.Path]:
    """Return files of the work folder by name, which is the order of their records."""
    return sorted(path for path in files.units.folder.iterdir() if path.name.startswith(prefix))


def write_part(
    files: OutputFiles,
    span: Span,
    answers: Sequence[Mapping[str, Any]],
    rejects: Sequence[Rejected],
) -> None:
    """Write one part: the counts of its answers, the answers, the rejected records."""
    # The counts come first, so that joining can copy lines without reading them as JSON.
    counts = {"answered": len(answers), "cut": sum(bool(line.get("cut")) for line in answers)}
    lines = [counts, *answers, *(reject._asdict() for reject in rejects)]
    with files.units.replacing(_part_path(files, span)) as partial, partial.open("wb") as file:
        file.writelines(map(json_lines.line, lines))


def assemble(files: OutputFiles, shard: int, spans: Sequence[Span]) -> None:
    """Join a shard's parts into its file unless it exists, then remove the parts.

    Its rejected records and its counts stay in the work folder, for the file of all rejected ones.
    """
    path = files.shards[shard]
    with explained(path):
        if not path.exists():
            try:
                _join_parts(files, shard, [_part_path(files, span) for span in spans])
            except _PartRemovedError as error:
                # Another process may have just finished this shard.
                if not path.exists():
                    raise _removed(error) from error
        # After the shard's file is in place: a kill in between leaves both, and loses nothing.
        for part in _work_files(files, f"part-{shard:05d}-"):
            part.unlink(missing_ok=True)


class _PartRemovedError(Exception):
    pass


def _join_parts(files: OutputFiles, shard: int, parts: Sequence[epath.Path]) -> None:
    rejects_path = files.units.folder / f"rejected-{shard:05d}.jsonl"
    # The rejected records go in place before the shard's file, because the file means that all of
    # the shard is done.
    with (
        files.units.finishing(shard, files.shards[shard]) as (answers_path, counts),
        files.units.replacing(rejects_path) as partial,
        answers_path.open("wb") as answers,
        partial.open("wb") as rejects,
    ):
        counts |= {"answered": 0, "rejected": 0, "cut": 0}
        for part in parts:
            try:
                lines = part.open("rb")
            except FileNotFoundError as error:
                raise _PartRemovedError(part) from error
            with lines:
                here = json_lines.value(next(lines))
                counts["answered"] += here["answered"]
                counts["cut"] += here["cut"]
                answers.writelines(islice(lines, here["answered"]))
                for line in lines:
                    rejects.write(line)
                    counts["rejected"] += 1


def finish(files: OutputFiles, chosen: Iterable[int]) -> Counter[str]:
    """Write the file of rejected records, and return the counts of the chosen, finished shards.

    The counts are "answered", "rejected", and "cut": answered from an input that was cut to fit.
    """
    with explained(files.rejected):
        seen = None
        # Processes that finish together may each see a part of the shards. The last one to write
        # looks again afterwards, and finds them all.
        while seen != (names := _work_files(files, "rejected-")):
            seen = names
            _join_rejects(files, names)
    files.units.remove_partial_files()
    return sum((Counter(files.units.note(shard)) for shard in chosen), Counter())


def _join_rejects(files: OutputFiles, names: Sequence[epath.Path]) -> None:
    # No file where nothing was rejected: its presence is a sign.
    filled = [path for path in names if path.stat().length]
    if filled:
        with files.units.replacing(files.rejected) as partial, partial.open("wb") as out:
            for path in filled:
                with path.open("rb") as lines:
                    out.writelines(lines)
