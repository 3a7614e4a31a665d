"""Write numbered records into shard files; a kill at any moment costs at most one window of work.

A shard is a contiguous range of the input's records, and is worked through in windows. A finished
window is a small part file in a hidden folder beside the output; the parts of a shard make its
file, and are then removed. Every file appears whole or not at all, so whatever a killed process
leaves is either finished or not there, and several processes may share one output.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained, is_remote
from cosmo.engine.data import datasets

# Endings of files that --output cannot be: a folder of such a name is a mistake.
_FILES = (".csv", ".gz", ".json", ".ndjson", ".parquet", ".tsv", ".txt")


class Rejected(NamedTuple):
    """A record that cannot be used: its line (from 1), why, and its text."""

    line: int
    reason: str
    record: str


class Span(NamedTuple):
    """The window [start, stop) of records (from 0) in shard `shard`."""

    shard: int
    start: int
    stop: int


class Source(NamedTuple):
    """Numbered records. `read` gives what each span holds, rejects among it; spans must ascend.

    `identity` is what tells these records from others, as JSON values.
    """

    name: str
    count: int
    identity: dict[str, Any]
    read: Callable[[Sequence[Span]], Iterator[list[Any]]]


def rows_source(name: str, rows: Sequence[datasets.Row]) -> Source:
    """Return a source of rows that are already in memory."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))

    def read(spans):
        yield from (list(rows[span.start : span.stop]) for span in spans)

    identity = {"records": len(rows), "sha256": digest.hexdigest()}
    return Source(name, len(rows), identity, read)


class Layout(NamedTuple):
    """The paths of a run's files. `work` is the hidden folder of the manifest and the parts."""

    shards: tuple[epath.Path, ...]
    rejected: epath.Path
    work: epath.Path

    @property
    def manifest(self) -> epath.Path:
        """The file with the settings that the output was begun with."""
        return self.work / "manifest.json"


def output_layout(output: str, num_shards: int) -> Layout:
    """Return the files of an output: one FILE.jsonl, or a folder of `predictions-*.jsonl` shards.

    Raises UserError for the name of another kind of file, which is no folder's.
    """
    path = epath.Path(output)
    if path.suffix == ".jsonl":
        if num_shards > 1:
            raise UserError(
                f"num_shards={num_shards} files do not fit in {output}; give a folder",
                setting=("num_shards", "output"),
            )
        return Layout((path,), path.with_name(f"{path.name}.rejected.jsonl"), _work(path))
    if path.suffix in _FILES and not path.is_dir():
        raise UserError(
            f"{output}: {path.suffix} files are not written; give FILE.jsonl or a folder",
            setting="output",
        )
    files = tuple(path / _shard_name("predictions", i, num_shards) for i in range(num_shards))
    return Layout(files, path / "rejected.jsonl", _work(path / "predictions"))


def task_layout(folder: str, name: str, num_shards: int) -> Layout:
    """Return the files of a SeqIO task: `NAME.jsonl`, or `NAME-00000-of-0000N.jsonl`."""
    path = epath.Path(folder) / f"{name}.jsonl"
    files = (path,)
    if num_shards > 1:
        files = tuple(path.with_name(_shard_name(name, i, num_shards)) for i in range(num_shards))
    return Layout(files, path.with_name(f"{name}-rejected.jsonl"), _work(path))


def _shard_name(stem: str, shard: int, num_shards: int) -> str:
    return f"{stem}-{shard:05d}-of-{num_shards:05d}.jsonl"


def _work(path: epath.Path) -> epath.Path:
    return path.with_name(f".{path.name}.work")


def parse(text: str | None, num_shards: int) -> list[int]:
    """Return the shards that a text such as "0-3" or "2,5" names, ascending; None: all."""
    if num_shards < 1:
        raise UserError(f"num_shards={num_shards}; it must be at least 1", setting="num_shards")
    if text is None:
        return list(range(num_shards))
    chosen: set[int] = set()
    for piece in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(
                f"shards={text}: give numbers and ranges, such as 0-3 or 2,5", setting="shards"
            )
        if int(found[2] or found[1]) >= num_shards:
            raise UserError(
                f"shards={text}: there are shards 0 to {num_shards - 1}",
                setting=("shards", "num_shards"),
            )
        chosen.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return sorted(chosen)


def spans(count: int, num_shards: int, window: int, chosen: Iterable[int]) -> list[Span]:
    """Return windows of `window` records of the chosen shards, which are as even as possible."""
    return [
        Span(shard, start, min(start + window, last))
        for shard in chosen
        for first, last in [(count * shard // num_shards, count * (shard + 1) // num_shards)]
        for start in range(first, last, window)
    ]


def prepare(layout: Layout, settings: Mapping[str, Any], window: int) -> int:
    """Make the folders. Return the window that the run began with, or `window` if it begins now.

    Raises UserError if the output cannot be written to, if what it holds was made with other
    settings, or was not made by this module.
    """
    outputs = (*layout.shards, layout.rejected)
    check_writable(layout)
    with explained(layout.work):
        kept = _read_manifest(layout)
        if kept is None:
            there = next((path for path in outputs if path.exists()), None)
            if there is not None:
                raise UserError(
                    f"{there} exists and is of no run that could go on; give another output, or "
                    "overwrite it",
                    setting=("output", "overwrite"),
                )
    if kept is None:
        return window
    _check_settings(layout, kept, settings)
    return kept["window"]


def check_writable(layout: Layout) -> None:
    """Make the folders. Raise UserError if they cannot be written, before a model is loaded."""
    with explained(layout.work, "give another output", setting="output"):
        if layout.shards[0].is_dir():
            raise UserError(f"cannot write {layout.shards[0]}: it is a folder")
        layout.work.mkdir(parents=True, exist_ok=True)
        probe = layout.work / f"partial-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()


def begin(
    layout: Layout, settings: Mapping[str, Any], window: int, *, overwrite: bool = False
) -> None:
    """Write the manifest unless it is there; `overwrite` removes an earlier run's files first."""
    if overwrite:
        with explained(layout.work):
            _remove(layout)
            layout.work.mkdir(parents=True, exist_ok=True)
    if _read_manifest(layout) is not None:
        check(layout, settings)
        return
    content = {
        "settings": settings,
        "window": window,
        "files": [path.name for path in (*layout.shards, layout.rejected)],
    }
    with explained(layout.manifest), replacing(layout, layout.manifest) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def check(layout: Layout, settings: Mapping[str, Any]) -> None:
    """Raise UserError if another command has meanwhile claimed the output for other settings."""
    with explained(layout.manifest):
        kept = _read_manifest(layout)
    if kept is None:
        raise UserError(f"{layout.manifest} was removed meanwhile; run the same command again")
    _check_settings(layout, kept, settings)


def _read_manifest(layout: Layout) -> dict[str, Any] | None:
    try:
        return json.loads(layout.manifest.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{layout.manifest} is damaged ({error}); overwrite the output", setting="overwrite"
        ) from error


def _check_settings(layout: Layout, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    old, new = _flat(kept["settings"]), _flat(settings)
    for name in (*new, *old):
        if old.get(name) != new.get(name):
            output = layout.shards[0] if len(layout.shards) == 1 else layout.shards[0].parent
            raise UserError(
                f"{output} was begun with {name}={old.get(name)!r}, this command "
                f"has {new.get(name)!r} (see {layout.manifest}); give another output, or "
                "overwrite it to start anew",
                setting=("output", "overwrite"),
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names: {"a.b": 1} for {"a": {"b": 1}}."""
    if not isinstance(value, Mapping):
        return {name: list(value) if isinstance(value, tuple) else value}
    return {
        full: leaf
        for key, inner in value.items()
        for full, leaf in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }


def _remove(layout: Layout) -> None:
    """Remove a run's files, whatever its number of shards; the manifest that lists them last."""
    try:
        listed = (_read_manifest(layout) or {"files": []})["files"]
    except UserError:
        listed = []
    # By name, beside the work folder: it may have been copied or moved since.
    here = [layout.work.parent / epath.Path(name).name for name in listed]
    for path in (*here, *layout.shards, layout.rejected):
        path.unlink(missing_ok=True)
    if layout.work.exists():
        for path in layout.work.iterdir():
            if path.name != layout.manifest.name:
                path.unlink(missing_ok=True)
        layout.work.rmtree()


def missing(layout: Layout, windows: Sequence[Span]) -> list[bool]:
    """Return for each window whether it is still to do: neither its part nor its shard exists."""
    with explained(layout.work):
        parts = {path.name for path in layout.work.iterdir()}
        done = {span.shard for span in windows if layout.shards[span.shard].exists()}
    return [span.shard not in done and _part(layout, span).name not in parts for span in windows]


def _part(layout: Layout, span: Span) -> epath.Path:
    return layout.work / f"part-{span.shard:05d}-{span.start:012d}-{span.stop:012d}.jsonl"


def _work_files(layout: Layout, prefix: str) -> list[epath.Path]:
    """Return files of the work folder by name, which is the order of their records."""
    return sorted(path for path in layout.work.iterdir() if path.name.startswith(prefix))


def write_part(
    layout: Layout, span: Span, answers: Sequence[Mapping[str, Any]], rejects: Sequence[Rejected]
) -> None:
    """Write one finished window: the counts of answers, the answers, what was rejected."""
    counts = {"answered": len(answers), "cut": sum(bool(line.get("cut")) for line in answers)}
    lines = [counts, *answers, *(reject._asdict() for reject in rejects)]
    with explained(layout.work), replacing(layout, _part(layout, span)) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def assemble(layout: Layout, shard: int, windows: Sequence[Span]) -> None:
    """Join a shard's parts into its file unless it exists, then remove the parts.

    What its records were rejected for, and how many were answered, stays in the work folder: the
    file of all rejects is made of that.
    """
    path = layout.shards[shard]
    with explained(path):
        if not path.exists():
            try:
                _join_parts(layout, shard, [_part(layout, span) for span in windows])
            except FileNotFoundError as error:
                if not path.exists():  # or else another process has just finished this shard
                    raise UserError(
                        f"{error.filename} was removed meanwhile; run the same command again"
                    ) from error
        for part in _work_files(layout, f"part-{shard:05d}-"):
            part.unlink(missing_ok=True)


def _join_parts(layout: Layout, shard: int, parts: Sequence[epath.Path]) -> None:
    totals: Counter[str] = Counter(answered=0, rejected=0, cut=0)
    with (
        replacing(layout, layout.shards[shard]) as answers,
        replacing(layout, layout.work / f"rejected-{shard:05d}.jsonl") as rejects,
        replacing(layout, layout.work / f"done-{shard:05d}.json") as done,
    ):  # the shard's file, which says that all is done, is put in place last
        for part in parts:
            with part.open("rb") as lines:
                counts = json.loads(next(lines))
                totals.update(counts)
                answers.writelines(islice(lines, counts["answered"]))
                for line in lines:
                    rejects.write(line)
                    totals["rejected"] += 1
        done.write(json.dumps(totals).encode())


def finish(layout: Layout, chosen: Iterable[int]) -> Counter[str]:
    """Write the file of rejects, and count the records of the chosen, finished shards.

    The counts are "answered", "rejected", and "cut": answered from an input that was cut to fit.
    """
    with explained(layout.rejected):
        seen = None
        # Processes that finish together may each see a part of the shards. Whoever writes last
        # looks again after writing, and finds them all.
        while seen != (names := _work_files(layout, "rejected-")):
            seen = names
            _join_rejects(layout, names)
        done = [json.loads((layout.work / f"done-{i:05d}.json").read_text()) for i in chosen]
    return sum(map(Counter, done), Counter())


def _join_rejects(layout: Layout, names: Sequence[epath.Path]) -> None:
    filled = [path for path in names if path.stat().length]
    if not filled:
        return
    with replacing(layout, layout.rejected) as out:
        for path in filled:
            with path.open("rb") as lines:
                out.writelines(lines)


@contextlib.contextmanager
def replacing(layout: Layout, path: epath.Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block succeeds and is removed otherwise."""
    partial = layout.work / f"partial-{uuid.uuid4().hex}"
    try:
        with partial.open("wb") as file:
            yield file
            if not is_remote(path):  # or a machine's crash could leave the name without the bytes
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
