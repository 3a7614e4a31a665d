"""Filters, names, duplicates and statistics over records that are there, in many processes.

`beam` runs the same functions on a cluster. A record is a row of SODA's schema with, where it
has one, its line of provenance; both of what a run wrote and of what others published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from data_pipeline.calls.outputs import FILES, Result
from data_pipeline.calls.requests import Rejected
from data_pipeline.calls.run import rejection
from data_pipeline.co3 import corpus, labels, postprocess, prompts, schema
from data_pipeline.co3.statistics import Statistics

CHUNK = 200  # records that a process is given at once


@dataclasses.dataclass(frozen=True)
class Choices:
    """What postprocessing is told; plain values, so that every process makes its own settings."""

    seed: int = 0
    prompts: str = str(prompts.DEFAULT)
    canary_labels: str = ""  # by ids of the records: see `labels`
    least_turns: int = 4
    most_turns: int = 20
    moderation_threshold: float = 0.5


@functools.lru_cache(maxsize=2)
def settings_of(choices: Choices) -> postprocess.Settings:
    """The stages' settings, made once a process. Raises UserError."""
    canary = corpus.canary_labels(Path(choices.canary_labels)) if choices.canary_labels else None
    try:
        texts = prompts.load(choices.prompts)
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={choices.prompts}: {error}") from error
    return postprocess.Settings(
        seed=choices.seed,
        prompts=texts,
        canary=canary,
        least_turns=choices.least_turns,
        most_turns=choices.most_turns,
        moderation_threshold=choices.moderation_threshold,
    )


def process(position: int, row: str, origin: str, choices: Choices) -> Result:
    """What becomes of one record: its lines, filtered and renamed, or a rejection's.

    A row that is not of SODA's schema is rejected, and says why.
    """
    try:
        known = json.loads(origin) if origin else None
        record = schema.from_row(json.loads(row), known)
    except (ValueError, TypeError, AttributeError) as error:
        about = {"detail": str(error), "line": row[:500]}
        return rejection(Rejected(f"line-{position}", "read", "broken row", about), position)
    if known is not None and "position" in known:
        position = known["position"]
    result = postprocess.postprocess(record, settings_of(choices))
    if isinstance(result, Rejected):
        return rejection(result, position)
    return corpus.result_of(result, position)


def pairs(paths: Iterable[Path]) -> Iterator[tuple[int, str, str]]:
    """(position, row, provenance or "") of files and folders: SODA as JSON lines or Parquet.

    A folder is a run's, or holds such files. Raises UserError.
    """
    position = 0
    for path in paths:
        for row, origin in _pairs_of(path):
            yield position, row, origin
            position += 1


def _pairs_of(path: Path) -> Iterator[tuple[str, str]]:
    try:
        if path.is_dir() and not (path / "soda.jsonl").exists():
            found = sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")])
            if not found:
                raise UserError(f"--input={path} holds no .jsonl or .parquet")
            for file in found:
                yield from _pairs_of(file)
            return
        path = path / "soda.jsonl" if path.is_dir() else path
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=1000):
                    yield from ((json.dumps(row), "") for row in batch.to_pylist())
            return
        beside = path.with_name("provenance.jsonl")
        with open(path, encoding="utf-8") as rows:
            if path.name == "soda.jsonl" and beside.exists():
                with open(beside, encoding="utf-8") as origins:
                    yield from zip(rows, origins, strict=True)
            else:
                yield from ((row, "") for row in rows if row.strip())
    except OSError as error:
        raise UserError(f"--input={path}: {error.strerror or error}") from error
    except ValueError as error:  # of unlike length
        raise UserError(
            f"--input={path} and provenance.jsonl are not of one run: {error}"
        ) from error


def labels_of(paths: list[Path], file: Path) -> dict[str, str]:
    """Canary's labels in `file` by the ids of the records in `paths`. Raises UserError."""
    ids, own = [], True
    for _, row, origin in pairs(paths):
        try:
            known = json.loads(origin) if origin else None
            own = own and known is not None
            ids.append(schema.from_row(json.loads(row), known).id)
        except (ValueError, TypeError, AttributeError):
            ids.append(None)  # rejected as a broken row, by `canary label` too
    return labels.by_id(file, ids, " ".join(map(str, paths)), own=own)


def _process_chunk(choices: Choices, chunk: list[tuple[int, str, str]]) -> list[Result]:
    return [process(*pair, choices) for pair in chunk]


def _count_chunk(rows: list[str]) -> Statistics:
    numbers = Statistics()
    for row in rows:
        numbers.add(json.loads(row))
    return numbers


def clean(
    paths: Iterable[Path], output: Path, choices: Choices, processes: int
) -> tuple[Statistics, Counter]:
    """Write soda, provenance and rejected.jsonl to `output`; their numbers. Raises UserError.

    The result does not depend on `processes`. Of duplicates the first stays.
    """
    settings_of(choices)  # errors are told here, not in a process
    paths = list(paths)
    known = labels_of(paths, Path(choices.canary_labels)) if choices.canary_labels else None
    output.mkdir(parents=True, exist_ok=True)
    if known is not None:  # every process reads them from here
        resolved = output / ".canary_labels.jsonl.partial"
        rows = (json.dumps({"id": name, "label": label}) for name, label in known.items())
        write_atomic(resolved, "".join(f"{row}\n" for row in rows))
        choices = dataclasses.replace(choices, canary_labels=str(resolved))
    places = {name: output / f".{name}.jsonl.partial" for name in FILES}
    keys: set[bytes] = set()
    reasons: Counter = Counter()
    numbers = Statistics()
    with _workers(processes) as work, contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(p, "w", encoding="utf-8")) for n, p in places.items()}
        chunks = iter(lambda source=pairs(paths): list(itertools.islice(source, CHUNK)), [])
        for results in work(functools.partial(_process_chunk, choices), chunks):
            for result in results:
                lines = result.duplicate if result.key in keys else result.lines
                if result.key:
                    keys.add(result.key)
                for name, line in lines.items():
                    files[name].write(line + "\n")
                if "rejected" in lines:
                    row = json.loads(lines["rejected"])
                    reasons[row["stage"], row["reason"]] += 1
        stack.close()
        with open(places["soda"], encoding="utf-8") as rows:
            chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
            for part in work(_count_chunk, chunks):
                numbers.merge(part)
    if not numbers.dialogues and not any(stage != "read" for stage, _ in reasons):
        for path in places.values():
            path.unlink()
        raise UserError(
            f"--input={' '.join(map(str, paths))} has no record that can be used ("
            f"{reasons.total()} broken): wanted are SODA's rows as JSON lines or .parquet"
        )
    for name, path in places.items():
        path.replace(output / f"{name}.jsonl")
    if known is not None:
        resolved.unlink()
    return numbers, reasons


class _workers:  # noqa: N801
    """A map over chunks, in order: in this process, or in several with a bounded queue."""

    def __init__(self, processes: int):
        self.processes = processes

    def __enter__(self) -> Any:
        if self.processes <= 1:
            self.pool = None
            return map
        self.pool = multiprocessing.get_context("spawn").Pool(self.processes)
        return self._map

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.terminate()

    def _map(self, function: Any, chunks: Iterable[Any]) -> Iterator[Any]:
        waiting = []
        for chunk in chunks:
            waiting.append(self.pool.apply_async(function, (chunk,)))
            if len(waiting) >= 4 * self.processes:
                yield waiting.pop(0).get()
        yield from (result.get() for result in waiting)
