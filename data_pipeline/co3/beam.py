r"""Post-processing of many records as an Apache Beam pipeline, over the functions of `postprocess`.

    python -m data_pipeline.co3.beam --rows='DIR/soda*.jsonl' --output=/tmp/soda \\
        [--provenance='DIR/provenance*.jsonl'] [--canary_labels=FILE] [--seed=N] [Beam's options]

Filters, name replacement, duplicates over all shards, and counts. Beam's own options choose where
it runs: the DirectRunner here (`--direct_num_workers=8 --direct_running_mode=multi_processing`),
elsewhere `--runner=DataflowRunner`, `FlinkRunner`, `SparkRunner`. Needs the extra `pipeline`, in an
environment of its own (Beam wants an older protobuf than requirements.lock has).

Leaves OUTPUT/soda*.jsonl, provenance*.jsonl, rejected*.jsonl, counts.jsonl and statistics.json
(the columns of the paper's tables 2 and 3). The lines are in no
order: Beam keeps none; which lines there are does not depend on it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import postprocess, schema
from data_pipeline.co3.schema import Record
from data_pipeline.co3.statistics import Statistics


class PostProcess(beam.PTransform):
    """(rows, provenance) as JSON lines -> {"kept": records, "rejected": Rejected}.

    A row finds its provenance by `original_index`; without one it is a row of unknown origin.
    Where there is provenance, rows that share an index are rejected: Beam keeps no order of lines,
    so whose is whose cannot be told.
    """

    def __init__(self, settings: postprocess.Settings = postprocess.Settings()):
        super().__init__()
        self.settings = settings

    def expand(self, lines: tuple[beam.PCollection, beam.PCollection]) -> dict[str, Any]:
        """Return the records and counts of the input's lines."""
        rows, origins = (
            lines[i] | f"read {name}" >> beam.Map(parse)
            for i, name in enumerate(("rows", "provenance"))
        )
        joined = {"rows": rows, "origins": origins} | beam.CoGroupByKey()
        checked = joined | "filter and rename" >> beam.FlatMap(
            functools.partial(records_of, settings=self.settings)
        )
        done = checked | "apart" >> beam.Partition(_which, 2)
        groups = (
            done[0]
            | beam.WithKeys(postprocess.duplicate_key)
            | "duplicates together" >> beam.GroupByKey()
            | "one of each" >> beam.FlatMap(first_and_rest)
        )
        single = groups | "apart again" >> beam.Partition(_which, 2)
        return {"kept": single[0], "rejected": (done[1], single[1]) | beam.Flatten()}


def parse(line: str) -> tuple[int, Any]:
    """(original_index, object) of a line; (-1, the line) where it is none."""
    try:
        value = json.loads(line)
        return int(value["original_index"]), value
    except (ValueError, TypeError, KeyError):
        return -1, line


def records_of(
    joined: tuple[int, dict[str, Iterable[Any]]], settings: postprocess.Settings
) -> Iterator[Record | Rejected]:
    """The rows of one index after filters and names; what is no row is rejected."""
    index, found = joined
    origins = [origin for origin in found["origins"] if isinstance(origin, dict)]
    records = []
    for row in found["rows"]:
        try:
            if index < 0:
                raise ValueError("no JSON object with original_index")
            records.append(schema.from_row(row, origins[0] if origins else None))
        except ValueError as error:
            lost = {"line": row if isinstance(row, str) else json.dumps(row)}
            yield Rejected(f"index-{index}", "read", "broken row", lost | {"error": str(error)})
    unclear = bool(origins) and (len(records) > 1 or len(origins) > 1)
    for record in records:
        if unclear:
            said = (
                f"original_index {index} is in {len(records)} rows and {len(origins)} lines of "
                "provenance: give one run's folder at a time, or leave out --runner, which "
                "joins line by line"
            )
            lost = {"error": said, "row": schema.soda_row(record)}
            yield Rejected(f"index-{index}", "read", "original_index of several rows", lost)
        else:
            yield postprocess.postprocess(record, settings)


def first_and_rest(group: tuple[str, Iterable[Record]]) -> Iterator[Record | Rejected]:
    """Of duplicates the first in the triples' file, and the others as rejected."""
    records = list(group[1])
    first = postprocess.first_of(records)
    records.remove(first)
    yield first
    for record in records:
        yield postprocess.duplicate(record)


def rejected_line(rejected: Rejected) -> str:
    """A line of rejected.jsonl."""
    row = {"id": rejected.id, "stage": rejected.stage, "reason": rejected.reason}
    return json.dumps({**row, **rejected.record}, ensure_ascii=False)


def row_line(record: Record) -> str:
    """A line of soda.jsonl, with the published SODA's fields."""
    return json.dumps(schema.soda_row(record), ensure_ascii=False)


def origin_line(record: Record) -> str:
    """A line of provenance.jsonl."""
    return json.dumps(schema.provenance(record), ensure_ascii=False)


def counted(item: Record | Rejected) -> Iterator[tuple[str, str]]:
    """What a report counts of a record: its relation, split and turns; or stage and reason."""
    if isinstance(item, Rejected):
        yield f"rejected by {item.stage}", item.reason
        return
    yield "relation", item.relation
    yield "split", item.split
    yield "turns", str(len(item.dialogue))


class Tally(beam.CombineFn):
    """Statistics over records, added up across workers."""

    def create_accumulator(self) -> Statistics:
        """Return empty statistics."""
        return Statistics()

    def add_input(self, numbers: Statistics, record: Record) -> Statistics:
        """Count a record."""
        numbers.add(schema.soda_row(record))
        return numbers

    def merge_accumulators(self, parts: Iterable[Statistics]) -> Statistics:
        """Add up the statistics of several workers."""
        whole = Statistics()
        for part in parts:
            whole.merge(part)
        return whole

    def extract_output(self, numbers: Statistics) -> str:
        """Return the statistics as JSON."""
        return json.dumps(numbers.table(), ensure_ascii=False)


def count_line(count: tuple[tuple[str, str], int]) -> str:
    """A count of what `counted` yields, as a line of JSON."""
    (what, value), number = count
    return json.dumps({"what": what, "value": value, "count": number}, ensure_ascii=False)


def _which(item: Record | Rejected, _: int) -> int:
    return int(isinstance(item, Rejected))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; what it does not know goes to Beam."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.co3.beam", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--rows", required=True, help="JSON lines of SODA's schema (a pattern)")
    parser.add_argument("--provenance", help="JSON lines of their provenance (a pattern)")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--canary_labels", help="JSON lines of id and label")
    parser.add_argument("--seed", type=int, default=0, help="of the names")
    parser.add_argument("--least_turns", type=int, default=4)
    parser.add_argument("--most_turns", type=int, default=20)
    parser.add_argument("--moderation_threshold", type=float, default=0.5)
    ours, beams = parser.parse_known_args(arguments)
    labels = None
    if ours.canary_labels:
        lines = Path(ours.canary_labels).read_text(encoding="utf-8").splitlines()
        labels = {str(row["id"]): str(row["label"]) for row in map(json.loads, lines)}
    settings = postprocess.Settings(
        seed=ours.seed,
        canary=labels,
        least_turns=ours.least_turns,
        most_turns=ours.most_turns,
        moderation_threshold=ours.moderation_threshold,
    )
    with beam.Pipeline(options=PipelineOptions(beams)) as pipeline:
        rows = pipeline | "rows" >> beam.io.ReadFromText(ours.rows)
        if ours.provenance:
            origins = pipeline | "provenance" >> beam.io.ReadFromText(ours.provenance)
        else:
            origins = pipeline | "no provenance" >> beam.Create([], reshuffle=False)
        found = (rows, origins) | PostProcess(settings)
        outputs = (
            ("soda", found["kept"] | "row lines" >> beam.Map(row_line)),
            ("provenance", found["kept"] | "origin lines" >> beam.Map(origin_line)),
            ("rejected", found["rejected"] | "rejected lines" >> beam.Map(rejected_line)),
        )
        for name, lines in outputs:
            path = f"{ours.output}/{name}"
            _ = lines | f"write {name}" >> beam.io.WriteToText(path, file_name_suffix=".jsonl")
        counts = (
            (found["kept"], found["rejected"])
            | "all" >> beam.Flatten()
            | "counted" >> beam.FlatMap(counted)
            | beam.combiners.Count.PerElement()
            | "count lines" >> beam.Map(count_line)
        )
        path = f"{ours.output}/counts"
        whole = {"num_shards": 1, "shard_name_template": ""}
        _ = counts | "write counts" >> beam.io.WriteToText(f"{path}.jsonl", **whole)
        numbers = found["kept"] | "statistics" >> beam.CombineGlobally(Tally())
        path = f"{ours.output}/statistics.json"
        _ = numbers | "write statistics" >> beam.io.WriteToText(path, **whole)


if __name__ == "__main__":
    # Workers find the functions in the module by its name, not in __main__.
    from data_pipeline.co3 import beam as module

    module.main()
