"""Post-process a finished corpus: in processes of this machine, or on many by Apache Beam.

Both executors apply `postprocess.process_chunk` to the same chunks, and both leave the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cosmo.engine.base import durable, json_lines, worker_processes
from cosmo.engine.base.atomic import replacing
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import resolve
from cosmo.engine.base.progress import Progress
from data_pipeline.calls.outputs import FILES
from data_pipeline.co3 import labels, postprocess, report
from data_pipeline.co3.postprocess import Chunk, Settings, chunks
from data_pipeline.co3.statistics import Statistics

ROWS_PER_CHUNK = 1000  # a fraction of a second of work, so that processes end at about one time

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
    durable.make_folder(output)
    with contextlib.ExitStack() as stack:
        # Nested, so that an error in here removes what was written and leaves earlier files.
        partial = {name: stack.enter_context(replacing(output / f"{name}.jsonl")) for name in FILES}
        executor(paths, settings, partial)
        reasons = report.count_reasons(partial["rejected"])
        # Rejections by filters are a result. Only an input without one readable row is an error.
        if partial["soda"].stat().st_size == 0 and all(stage == "read" for stage, _ in reasons):
            raise UserError(
                f"{' '.join(map(str, paths))}: no record can be used ({reasons.total()} are "
                "broken). Give SODA's rows as JSON lines or .parquet",
                setting="input",
            )
        numbers = Statistics()
        # Counted from the file, because Beam's workers return nothing to this process.
        rows = chunks([partial["soda"]], ROWS_PER_CHUNK)
        for part in results_in_order(count_chunk, rows, processes):
            # In order, because the sum of floats depends on it.
            numbers.merge(part)
    return numbers, reasons


def labels_of(paths: Sequence[Any], file: Any) -> dict[str, str]:
    """Return Canary's labels in `file` by the ids of the records in `paths`. Raises UserError."""
    ids, own = [], True
    for chunk in chunks(paths, ROWS_PER_CHUNK):
        for _, row, origin in chunk.read():
            try:
                record, known = postprocess.record_of(row, origin)
                # One row without provenance means that the ids are row numbers.
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
    # Duplicates are found here, because a worker sees the rows of its chunk alone.
    keys: set[bytes] = set()
    process = functools.partial(postprocess.process_chunk, settings=settings)
    work = chunks(paths, ROWS_PER_CHUNK)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in places.items()}
        for results in results_in_order(process, work, processes):
            for result in results:
                for name, line in result.keep_first(keys).items():
                    files[name].write(json_lines.encode(line) + b"\n")


def results_in_order(
    function: Callable[[Chunk], Any], work: Iterable[Chunk], processes: int
) -> Iterator[Any]:
    """Yield the result of each chunk in order, from this process or from several."""
    # Starting a process takes longer than a small corpus.
    if processes <= 1:
        yield from map(function, work)
        return
    # A list, because the progress bar needs the number of rows.
    jobs = list(enumerate(work))
    progress = Progress(sum(chunk.count for _, chunk in jobs), unit="row", late=True)
    # Through files, because the results of a corpus may not fit into memory.
    with tempfile.TemporaryDirectory() as folder:
        if jobs:
            do = functools.partial(_write_result, function, folder)
            kept = "earlier outputs are unchanged"
            worker_processes.run(do, jobs, processes, progress.add, kept=kept)
        progress.finish()
        for number, _ in jobs:
            path = pathlib.Path(folder, str(number))
            yield pickle.loads(path.read_bytes())
            # At once, so that the disk holds only the results that are still to be used.
            path.unlink()


def _write_result(
    function: Callable[[Chunk], Any],
    folder: str,
    job: tuple[int, Chunk],
    report: Callable[[int], None],
) -> None:
    number, chunk = job
    pathlib.Path(folder, str(number)).write_bytes(pickle.dumps(function(chunk)))
    report(chunk.count)


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
    # Beside the output, because all of Beam's machines reach that.
    folder = places["soda"].parent / ".parts"
    _remove(folder)  # parts of a run that was killed
    folder.mkdir()
    beam.write_parts(list(chunks(paths, beam.ROWS_PER_CHUNK)), settings, folder, options)
    for name, place in places.items():
        with place.open("wb") as whole:
            # Chunk numbers have eight digits, so the order of names is that of the input.
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
