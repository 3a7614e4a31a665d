"""Triples read from the three formats."""

import collections
import json

import pytest

from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import triples
from data_pipeline.co3.triples import Triple

ROW = {"head": "PersonX sees PersonY", "relation": "xWant", "tail": "to say hello"}


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reasons(found):
    return [t.reason if isinstance(t, Rejected) else "ok" for t in found]


@pytest.mark.parametrize(
    "row, reason",
    [
        (ROW, "ok"),
        (ROW | {"tail": "none"}, "none"),
        (ROW | {"tail": " None. "}, "none"),
        (ROW | {"tail": "nonexistent"}, "ok"),
        (ROW | {"head": "PersonX buys ___"}, "blank"),
        (ROW | {"tail": "to buy ___"}, "blank"),
        (ROW | {"relation": "oWant"}, "relation not used"),
        (ROW | {"relation": "HinderedBy"}, "relation not used"),
        (ROW | {"head": "wage war"}, "no PersonX in head"),
        (ROW | {"head": "personx sees PersonY"}, "ok"),
        (ROW | {"tail": " . "}, "empty"),
        (ROW | {"tail": None}, "no text in field tail"),
        (ROW | {"head": 3}, "no text in field head"),
        ({"head": "a", "tail": "b"}, "no text in field relation"),
        ('{"head": "PersonX', "broken line"),
        ("[1, 2]", "not an object"),
        ("\x00\x01", "broken line"),
        ("[" * 100_000, "broken line"),
        ({"head": ROW["head"], "relation": "xWant", "inference": "to go"}, "ok"),
    ],
)
def test_each_row_is_a_triple_or_has_a_reason(row, reason, tmp_path):
    """Oracle: by hand."""
    assert reasons(triples.read(write(tmp_path / "a.jsonl", [row]))) == [reason]


def test_bytes_that_are_no_text(tmp_path):
    """Oracle: the line is quarantined with what can be read of it, the next one is read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"head": "\xff\xfe"}\n' + json.dumps(ROW).encode() + b"\n")
    bad, good = triples.read(path)
    assert bad.reason == "broken line" and bad.id == "line-0" and "head" in bad.record["line"]
    assert good.index == 1


def test_critic(tmp_path):
    """Oracle: ATOMIC-10X's booleans."""
    kept = ROW | {"rec_0.5": False, "rec_0.9": True, "split": "val", "p_valid_model": 0.7}
    path = write(tmp_path / "atomic10x.jsonl", [kept, ROW | {"tail": "to go"}])
    assert reasons(triples.read(path)) == ["ok", "ok"]
    without = "no true or false in field rec_"
    assert reasons(triples.read(path, "rec_0.5")) == ["below the critic", f"{without}0.5"]
    assert reasons(triples.read(path, "rec_0.9")) == ["ok", f"{without}0.9"]
    assert next(triples.read(path)).split == "valid"
    with pytest.raises(ValueError, match=r"rec_0\.4"):
        next(triples.read(path, "rec_0.4"))


def test_sodaverse_parquet(tmp_path):
    """Oracle: the row written; names stay as they were drawn."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    row = ROW | {"x": "Veda", "y": "Ann", "z": "", "x_relations": True}
    row |= {"named_literal": "Veda sees Ann. Now Veda wants to say hello."}
    rows = [row, row | {"x": "Bob"}, row | {"x": "Eve", "x_relations": False}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second, third = triples.read(tmp_path / "a.parquet")
    assert first.names == ("Veda", "Ann", "") and first.literal == row["named_literal"]
    assert second.id != first.id and second.index == 1
    assert third.reason == "relation not used"


def test_ids_outlive_order_and_duplicates_are_dropped(tmp_path):
    """Oracle: the same content has the same id wherever it stands, and is taken once."""
    other = ROW | {"tail": "to go"}
    a = list(triples.read(write(tmp_path / "a.jsonl", [ROW, other, ROW])))
    b = list(triples.read(write(tmp_path / "b.jsonl", [other, "", ROW])))
    assert reasons(a) == ["ok", "ok", "duplicate"]
    assert [t.id for t in a[:2]] == [t.id for t in b[::-1]]
    assert [t.index for t in b] == [0, 2]


def test_shards_are_disjoint_and_complete(shared):
    """Oracle: each triple is of exactly one shard."""
    found = [t for t in triples.read(shared / "data/atomic_triples.jsonl") if isinstance(t, Triple)]
    counts = [sum(triples.shard(t, i, 3) for t in found) for i in range(3)]
    assert sum(counts) == len(found) and min(counts) > len(found) / 4
    assert all(sum(triples.shard(t, i, 3) for i in range(3)) == 1 for t in found)


def test_real_triples_are_read_or_counted(shared):
    """Oracle: 6,000 lines, counted by hand with grep for relation, none and blanks."""
    path = shared / "data/atomic_triples.jsonl"
    counts = collections.Counter(reasons(triples.read(path)))
    assert sum(counts.values()) == 6000
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    used = [row for row in rows if row["relation"] in triples.RELATIONS]
    assert counts["relation not used"] == len(rows) - len(used)
    none = [row for row in used if row["tail"].strip() == "none"]
    assert counts["none"] == len(none)
    rest = [row for row in used if row["tail"].strip() != "none"]
    assert counts["blank"] == sum("___" in row["head"] + row["tail"] for row in rest)


def some(relation, count):
    return [
        Triple(triples.content_id("h", relation, str(i)), "h", relation, str(i), i)
        for i in range(count)
    ]


def test_sample_has_the_ratios_of_table_3():
    """Oracle: 101 shares, so 202 triples are twice each."""
    pool = [t for relation in triples.SODA_RATIOS for t in some(relation, 100)]
    drawn = triples.sample(pool, 202)
    counts = collections.Counter(t.relation for t in drawn)
    assert counts == {relation: 2 * share for relation, share in triples.SODA_RATIOS.items()}


def test_sample_depends_on_seed_and_ids_alone():
    """Oracle: order of input changes nothing; another seed does."""
    pool = some("xNeed", 50) + some("xWant", 50)
    ratios = {"xNeed": 1, "xWant": 3}
    drawn = triples.sample(pool, 20, 1, ratios)
    assert {t.id for t in drawn} == {t.id for t in triples.sample(pool[::-1], 20, 1, ratios)}
    assert {t.id for t in drawn} != {t.id for t in triples.sample(pool, 20, 2, ratios)}


def test_sample_keeps_the_ratios_where_a_relation_is_scarce():
    """Oracle: 5 of xNeed allow 15 of xWant."""
    pool = some("xNeed", 5) + some("xWant", 500)
    drawn = triples.sample(pool, 200, 0, {"xNeed": 1, "xWant": 3})
    assert collections.Counter(t.relation for t in drawn) == {"xNeed": 5, "xWant": 15}


def test_a_head_is_of_one_split():
    """Oracle: 80, 10 and 10 percent of heads, within five standard deviations of 2,000."""
    counts = collections.Counter(triples._split_of(f"PersonX does {i}") for i in range(2000))
    assert abs(counts["train"] - 1600) < 90 and abs(counts["valid"] - 200) < 70
