"""Post-processing as a Beam pipeline, on the DirectRunner. Needs the extra `pipeline`."""

import dataclasses
import json

import pytest

pytest.importorskip("apache_beam", reason="needs the extra `pipeline`")

from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import beam, postprocess, schema


def records(shared, count=40):
    """The real rows over and over, each another dialogue; some of them bad, some twice."""
    rows = [json.loads(line) for line in (shared / "data/soda_rows.jsonl").open()]
    for i in range(count):
        row = rows[i % 5] | {"original_index": 1000 - i}
        row["dialogue"] = [f"It is day {i // 2}.", *row["dialogue"]] if i % 3 else ["Hi.", "Bye."]
        first = row["speakers"][0]
        other = next(name for name in row["speakers"] if name != first)
        names = [other, *row["speakers"]]
        row["speakers"] = names[: len(row["dialogue"])]
        yield schema.from_row(row, {"id": f"r{i}"})


def read(folder, name):
    lines = [line for path in folder.glob(f"{name}*.jsonl") for line in path.open()]
    return sorted(json.dumps(json.loads(line), sort_keys=True) for line in lines)


def test_beam_does_what_the_functions_do(shared, tmp_path):
    """Oracle: postprocess, then dedup in the order of the triples' file, one after another."""
    found = list(records(shared))
    again = [
        dataclasses.replace(r, id=f"s{i}", original_index=5000 + i) for i, r in enumerate(found[:9])
    ]
    found += again
    (tmp_path / "rows.jsonl").write_text(
        "\n".join([beam.row_line(r) for r in found] + ["{broken", '{"original_index": 3}'])
    )
    (tmp_path / "origins.jsonl").write_text("\n".join(beam.origin_line(r) for r in found))
    (tmp_path / "labels.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"id": r.id, "label": "__needs_intervention__" if i % 7 == 1 else "__casual__"}
            )
            for i, r in enumerate(found)
        )
    )
    paths = {name: f"--{name}={tmp_path}/{file}.jsonl" for name, file in (
        ("rows", "rows"), ("provenance", "origins"), ("canary_labels", "labels")
    )}  # fmt: skip
    beam.main([*paths.values(), f"--output={tmp_path}/out", "--seed=3", "--runner=DirectRunner"])

    labels = {
        r.id: "__needs_intervention__" if i % 7 == 1 else "__casual__" for i, r in enumerate(found)
    }
    settings = postprocess.Settings(seed=3, canary=labels)
    done = [postprocess.postprocess(r, settings) for r in found]
    kept = sorted((r for r in done if isinstance(r, schema.Record)), key=lambda r: r.original_index)
    final = list(postprocess.dedup(kept))
    records_left = [r for r in final if isinstance(r, schema.Record)]
    gone = [r for r in [*done, *final] if isinstance(r, Rejected)]

    def lines(function, items):
        return sorted(json.dumps(json.loads(function(i)), sort_keys=True) for i in items)

    out = tmp_path / "out"
    assert read(out, "soda") == lines(beam.row_line, records_left)
    assert read(out, "provenance") == lines(beam.origin_line, records_left)
    rejected = read(out, "rejected")
    broken = [line for line in rejected if "broken row" in line]
    assert sorted(set(rejected) - set(broken)) == lines(beam.rejected_line, gone)
    assert len(broken) == 2 and len(rejected) == len(gone) + 2
    counts = {(c["what"], c["value"]): c["count"] for c in map(json.loads, read(out, "counts"))}
    assert counts["rejected by turns", "fewer than 4 turns"] == sum(
        r.stage == "turns" for r in gone
    )
    assert (
        counts["rejected by dedup", "duplicate dialogue"]
        == sum(r.stage == "dedup" for r in gone)
        > 0
    )
    assert sum(n for (what, _), n in counts.items() if what == "relation") == len(records_left)


def test_rows_that_share_an_index_take_nobodys_provenance(shared):
    """Two corpora put together. Oracle: by hand; alone, or without provenance, each is taken."""
    one = next(r for r in records(shared) if len(r.dialogue) > 3)
    two = dataclasses.replace(one, id="other", narrative=f"{one.narrative} It is late.")
    rows = [schema.soda_row(r) for r in (one, two)]
    origins = [schema.provenance(r) for r in (one, two)]

    def found(rows, origins):
        joined = (one.original_index, {"rows": rows, "origins": origins})
        return list(beam.records_of(joined, postprocess.Settings()))

    for several in ((rows, origins), (rows, origins[:1]), (rows[:1], origins)):
        gone = found(*several)
        assert len(gone) == len(several[0])
        assert {r.reason for r in gone} == {"original_index of several rows"}
        assert str(one.original_index) in gone[0].record["error"]
    assert [r.id for r in found(rows[:1], origins[:1])] == [one.id]
    assert all(isinstance(r, schema.Record) for r in found(rows, []))
