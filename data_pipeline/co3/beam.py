"""Process the chunks of a corpus on many machines by Apache Beam (extra `pipeline`).

Beam keeps no order, so each line travels with its place, and the parts are sorted by it. Workers
read the input and write the parts, so both must lie where all machines reach them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from cosmo.engine.base import json_lines
from cosmo.engine.base.atomic import replacing
from cosmo.engine.base.files import resolve
from data_pipeline.calls.outputs import FILES, Lines, Result
from data_pipeline.co3 import postprocess
from data_pipeline.co3.postprocess import Chunk, Settings

ROWS_PER_CHUNK = 5000  # a part of some megabytes: SODA's 1.5 million rows are 300 parts
Place = tuple[int, int]  # number of the chunk, number of the row in it


def write_parts(
    chunks: Sequence[Chunk], settings: Settings, folder: Any, options: Sequence[str]
) -> None:
    """Write NAME-NUMBER of every file and chunk to `folder`; duplicates go over all chunks."""
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = (
            pipeline
            # Reshuffled, because a runner may else process all chunks on the worker that creates
            # them.
            | beam.Create(list(enumerate(chunks)), reshuffle=True)
            | "process" >> beam.FlatMap(_by_key, settings)
            | "duplicates together" >> beam.GroupByKey()
            | "keep the first" >> beam.FlatMap(_keep_first)
            | "chunks together" >> beam.GroupByKey()
            | "write" >> beam.Map(_write_part, str(folder))
        )


def _by_key(
    numbered: tuple[int, Chunk], settings: Settings
) -> Iterator[tuple[bytes, tuple[Place, Result]]]:
    number, chunk = numbered
    for row, result in enumerate(postprocess.process_chunk(chunk, settings)):
        # A rejection is no duplicate, so it is a group alone: keys have 12 bytes, this one 16.
        key = result.key or number.to_bytes(8) + row.to_bytes(8)
        yield key, ((number, row), result)


def _keep_first(
    group: tuple[bytes, Iterable[tuple[Place, Result]]],
) -> Iterator[tuple[int, tuple[int, Lines]]]:
    keys: set[bytes] = set()
    # By place alone, because results have no order.
    for (number, row), result in sorted(group[1], key=lambda item: item[0]):
        yield number, (row, result.keep_first(keys))


def _write_part(group: tuple[int, Iterable[tuple[int, Lines]]], folder: str) -> None:
    number, rows = group
    lines = [line for _, line in sorted(rows, key=lambda item: item[0])]
    for name in FILES:
        text = "".join(f"{row[name]}\n" for row in lines if name in row)
        path = resolve(folder) / f"{name}-{number:08d}"
        # Beam may run a bundle twice at once, so each try needs a temporary name of its own.
        with replacing(path, path.with_name(f".{path.name}.{uuid.uuid4().hex}")) as partial:
            partial.write_bytes(json_lines.encode(text))
