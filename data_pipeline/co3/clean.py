"""Post-process a finished corpus: in processes of this machine, or on many by Apache Beam.

Both executors apply `postprocess.process_chunk` to the same chunks, and both leave the same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cosmo.engine.base.atomic import replacing
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import resolve
from data_pipeline.calls.outputs import FILES, Result
from data_pipeline.co3 import labels, postprocess
from data_pipeline.co3.postprocess import Chunk, Settings, chunks
from data_pipeline.co3.statistics import Statistics

ROWS_PER_CHUNK = 200  # small, so that few results wait for those before them
WAITING_CHUNKS_PER_PROCESS = 4  # enough that no process waits for the writer

# Writes the files FILES of `folder`, processed from the paths.
Executor = Callable[[Sequence[Any], Settings, Any], None]


def clean(
    paths: Sequence[Any],
    output: Any,
    settings: Settings,
    executor: Executor,
    canary_labels: Any = None,
    processes: int = 1,
) -> tuple[Statistics, Counter]:
    """Write soda, provenance and rejected.jsonl to `output`; return their numbers.

    The first of duplicates in the input stays. Raises UserError if no record can be used; then
    earlier files in `output` stay.
    """
    if canary_labels:
        settings = dataclasses.replace(settings, canary=labels_of(paths, canary_labels))
    output = resolve(output)
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Nested, so that an error in here removes what was written and leaves earlier files.
        partial = {name: stack.enter_context(replacing(output / f"{name}.jsonl")) for name in FILES}
        executor(paths, settings, partial)
        reasons: Counter = Counter()
        with partial["rejected"].open("rb") as lines:
            for row in map(json.loads, lines):
                reasons[row["stage"], row["reason"]] += 1
        if partial["soda"].stat().st_size == 0 and all(stage == "read" for stage, _ in reasons):
            raise UserError(
                f"{' '.join(map(str, paths))}: no record can be used ({reasons.total()} are "
                "broken). Give SODA's rows as JSON lines or .parquet",
                setting="input",
            )
        numbers = Statistics()
        rows = chunks([partial["soda"]], ROWS_PER_CHUNK)
        for part in ordered_map(count_chunk, rows, processes):
            numbers.merge(part)
    return numbers, reasons


def labels_of(paths: Sequence[Any], file: Any) -> dict[str, str]:
    """Return Canary's labels in `file` by the ids of the records in `paths`. Raises UserError."""
    ids, own = [], True
    for chunk in chunks(paths, ROWS_PER_CHUNK):
        for _, row, origin in chunk.read():
            try:
                record, known = postprocess.record_of(row, origin)
                own = own and bool(known)
                ids.append(record.id)
            except ValueError:
                ids.append(None)  # rejected as a broken row, by `canary label` too
    return labels.by_id(file, ids, " ".join(map(str, paths)), own=own)


def count_chunk(chunk: Chunk) -> Statistics:
    """Return the statistics of a chunk of soda.jsonl."""
    numbers = Statistics()
    for _, row, _ in chunk.read():
        numbers.add(json.loads(row))
    return numbers


def in_processes(
    processes: int, paths: Sequence[Any], settings: Settings, places: dict[str, Any]
) -> None:
    """Process `paths` in this many processes of this machine; write the files `places`."""
    keys: set[bytes] = set()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in places.items()}
        work = chunks(paths, ROWS_PER_CHUNK)
        for results in ordered_map(_process_chunk, work, processes, settings):
            for result in results:
                for name, line in result.keep_first(keys).items():
                    files[name].write(line.encode() + b"\n")


def ordered_map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    processes: int,
    settings: Settings | None = None,
) -> Iterator[Any]:
    """Yield the results in the order of the items: of this process, or of several.

    At most WAITING_CHUNKS_PER_PROCESS items a process are ahead of the caller.
    """
    if processes <= 1:
        _start(settings)
        yield from map(function, items)
        return
    # spawn, because a fork copies locks that threads of this process may hold.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start, (settings,)) as pool:
        waiting: collections.deque = collections.deque()
        # Not pool.map: it submits all items at once, so all results could wait in memory.
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= WAITING_CHUNKS_PER_PROCESS * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_settings: Settings | None = None  # of this process


def _start(settings: Settings | None) -> None:
    # Once a process, not with each chunk: the labels of a corpus take megabytes.
    global _settings
    _settings = settings


def _process_chunk(chunk: Chunk) -> list[Result]:
    return postprocess.process_chunk(chunk, _settings)


def by_beam(
    options: Sequence[str], paths: Sequence[Any], settings: Settings, places: dict[str, Any]
) -> None:
    """Process `paths` by Apache Beam with its own `options`; write the files `places`.

    Raises UserError if Beam is missing.
    """
    try:
        from data_pipeline.co3 import beam
    except ImportError as error:
        raise UserError(
            f"{error}: install Apache Beam in an environment of its own (pip install -e "
            "'.[pipeline]'), or run in processes",
            setting="runner",
        ) from error
    folder = places["soda"].parent / ".parts"
    _remove(folder)  # parts of a run that was killed
    folder.mkdir()
    beam.write_parts(list(chunks(paths, beam.ROWS_PER_CHUNK)), settings, folder, options)
    for name, place in places.items():
        with place.open("wb") as whole:
            for part in sorted(folder.glob(f"{name}-*")):
                whole.write(part.read_bytes())
    _remove(folder)


def _remove(folder: Any) -> None:
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def executor(runner: str | None, options: Sequence[str], processes: int) -> Executor:
    """Return Beam's executor if there is a runner, else that of processes."""
    if runner:
        return functools.partial(by_beam, [f"--runner={runner}", *options])
    return functools.partial(in_processes, processes)
