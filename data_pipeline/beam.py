"""Postprocessing as an Apache Beam pipeline: the same functions, on one machine or on a cluster.

The rows are read from one or more patterns of files, with the lines of provenance that have the
same `original_index`. Beam keeps no order: the files written hold the same lines as those of
`postprocessing`, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from data_pipeline import corpus, postprocessing
from data_pipeline.postprocessing import Choices
from data_pipeline.statistics import Statistics


class Count(beam.CombineFn):
    """Statistics over rows, added up across workers."""

    def create_accumulator(self) -> Statistics:
        return Statistics()

    def add_input(self, numbers: Statistics, row: str) -> Statistics:
        numbers.add(json.loads(row))
        return numbers

    def merge_accumulators(self, parts: Iterable[Statistics]) -> Statistics:
        whole = Statistics()
        for part in parts:
            whole.merge(part)
        return whole

    def extract_output(self, numbers: Statistics) -> Statistics:
        return numbers


def _keyed(line: str) -> tuple[Any, str]:
    try:
        return json.loads(line)["original_index"], line
    except (ValueError, KeyError, TypeError):
        return -1, line  # a broken row, which becomes a rejection that says so


def _process(item: tuple[Any, dict[str, Iterable[str]]], choices: Choices) -> Iterator[Any]:
    index, lines = item
    origins = list(lines["origins"])
    for row in lines["rows"]:
        result = postprocessing.process(index, row, origins[0] if origins else "", choices)
        if "rejected" in result.lines:
            yield beam.pvalue.TaggedOutput("rejected", result.lines["rejected"])
        else:
            yield result.key, (result.lines["soda"], result.lines["provenance"])


def _first(item: tuple[bytes, Iterable[tuple[str, str]]]) -> Iterator[Any]:
    """Of duplicates the first in the triples' file; the others are rejected."""
    order = {line: _order(line) for line in item[1]}
    kept, *others = sorted(order, key=order.__getitem__)
    yield kept
    for row, origin in others:
        line = corpus.duplicate_line(json.loads(row), json.loads(origin))
        yield beam.pvalue.TaggedOutput("rejected", line)


def _order(line: tuple[str, str]) -> tuple[int, int]:
    origin = json.loads(line[1])
    return origin["position"], origin["original_index"]


def _reason(line: str) -> tuple[str, str]:
    row = json.loads(line)
    return row["stage"], row["reason"]


def _reason_line(counted: tuple[tuple[str, str], int]) -> str:
    (stage, reason), number = counted
    return json.dumps({"stage": stage, "reason": reason, "number": number})


def run(
    rows: list[str], origins: list[str], output: str, choices: Choices, options: list[str]
) -> None:
    """Postprocess the rows of the files that match `rows` (and `origins`) into `output`.

    Writes soda-*, provenance-* and rejected-*.jsonl and, as JSON lines, statistics-* (one) and
    reasons-* ({"stage", "reason", "number"}). `options` are Beam's, such as --runner=FlinkRunner.
    """
    settings = PipelineOptions(options)
    settings.view_as(SetupOptions).save_main_session = False

    def read(pipeline: Any, name: str, patterns: list[str]) -> Any:
        files = pipeline | f"{name} files" >> beam.Create(patterns)
        lines = files | f"read {name}" >> beam.io.ReadAllFromText()
        lines |= f"no empty {name}" >> beam.Filter(str.strip)
        return lines | f"{name} by index" >> beam.Map(_keyed)

    def write(lines: Any, name: str) -> None:
        place = beam.io.WriteToText(f"{output}/{name}", file_name_suffix=".jsonl")
        _ = lines | f"write {name}" >> place

    with beam.Pipeline(options=settings) as pipeline:
        both = {"rows": read(pipeline, "rows", rows), "origins": read(pipeline, "origins", origins)}
        done = (
            both
            | "rows with their origins" >> beam.CoGroupByKey()
            | "filters and names" >> beam.FlatMap(_process, choices).with_outputs(main="kept")
        )
        unique = (
            done.kept
            | "alike" >> beam.GroupByKey()
            | "first" >> beam.FlatMap(_first).with_outputs(main="kept")
        )
        rejected = (done.rejected, unique.rejected) | "all rejected" >> beam.Flatten()
        soda = unique.kept | "row" >> beam.Map(lambda lines: lines[0])
        write(soda, "soda")
        write(unique.kept | "origin" >> beam.Map(lambda lines: lines[1]), "provenance")
        write(rejected, "rejected")
        numbers = soda | "count" >> beam.CombineGlobally(Count())
        write(numbers | "table" >> beam.Map(lambda n: json.dumps(n.table())), "statistics")
        reasons = rejected | "reason" >> beam.Map(_reason)
        reasons |= "number" >> beam.combiners.Count.PerElement()
        write(reasons | "line" >> beam.Map(_reason_line), "reasons")
