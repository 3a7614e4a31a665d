"""Plain records to rows."""

import bz2
import codecs
import gzip
import json
import lzma

import pyarrow
import pytest

from cosmo import records
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import record_sources
from cosmo.tasks import formatting, vocabularies


@pytest.fixture(scope="module")
def vocabulary():
    return vocabularies.load("tasks/sample/vocabulary.model")


def test_row_is_the_formatted_text_with_eos(vocabulary):
    """Oracle: cosmo.tasks.formatting and the vocabulary."""
    record = {"narrative": "N n.", "instruction": "I i", "turns": ["a b", "c"], "response": "d"}
    row = records.row(record, vocabulary, 64)
    assert row.inputs == formatting.cosmo_input("N n.", "I i", ["a b", "c"])
    assert row.input_ids == (*vocabulary.encode(row.inputs), 1)
    assert row.target_ids == (*vocabulary.encode("d"), 1)


def test_oldest_turns_go_first(vocabulary):
    """Property: the newest turn and the fixed parts stay, the row fits."""
    turns = [f"this is utterance number {i} of many" for i in range(30)]
    row = records.row({"narrative": "A story.", "turns": turns}, vocabulary, 64)
    assert len(row.input_ids) <= 64
    assert row.inputs.startswith("A story. <sep> ")
    assert row.inputs.endswith(turns[-1])
    assert turns[0] not in row.inputs
    assert row.cut
    assert not records.row({"turns": turns[:1]}, vocabulary, 64).cut


def test_one_endless_turn_keeps_its_end_and_eos(vocabulary):
    """Property: the newest words are what is answered."""
    row = records.row({"turns": ["word " * 200 + "finally"]}, vocabulary, 16)
    assert len(row.input_ids) == 16
    assert row.input_ids[-1] == 1
    assert vocabulary.decode(row.input_ids).endswith("finally")
    assert row.cut


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ([], "object"),
        ({}, "turns"),
        ({"turns": "hello"}, "turns"),
        ({"turns": ["a", ""]}, "turns"),
        ({"turns": ["a"], "narrative": 3}, "narrative"),
        ({"turns": ["a"], "response": ["x"]}, "response"),
    ],
)
def test_bad_records_name_the_field(vocabulary, record, field):
    """Every mistake says which field it is in."""
    with pytest.raises(ValueError, match=field):
        records.row(record, vocabulary, 64)


def source(path, rows, vocabulary):
    """The rows of a file of these records."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = records.source(str(path), vocabulary, 64)
    (items,) = found.read([record_sources.Span(0, 0, found.count)])
    return items


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None, "a", None], ["0", "a", "2"]),
        ([None, "0"], ["#0", "0"]),
        (["7", None], ["7", "#1"]),  # by form: whether it is a line's number plays no part
        ([None, 0, "##1"], ["###0", "0", "##1"]),
        (["#x", None], ["#x", "1"]),
    ],
)
def test_an_automatic_id_equals_no_given_one(tmp_path, vocabulary, given, expected):
    """Oracle: by hand: the record's number, behind a # more than any id of that form has."""
    rows = [{"turns": ["Hi."]} | ({} if name is None else {"id": name}) for name in given]
    assert [row.id for row in source(tmp_path / "in.jsonl", rows, vocabulary)] == expected


def test_ids_given_twice_are_named(tmp_path, vocabulary, caplog):
    """Oracle: by hand, ids and lines; one warning, and none for a file without."""
    rows = [{"turns": ["Hi."], "id": name} for name in ("a", "b", "a", "c", "b", "b", "d", "d")]
    source(tmp_path / "in.jsonl", rows, vocabulary)
    (record,) = caplog.records
    assert "'a' (lines 1 and 3), 'b' (lines 2 and 5), 'b' (lines 5 and 6)" in record.getMessage()
    assert "and 1 more" in record.getMessage()
    caplog.clear()
    source(tmp_path / "in.jsonl", rows[:2], vocabulary)
    assert not caplog.records


def test_unknown_fields_are_ignored_with_one_warning(tmp_path, vocabulary, caplog):
    """Oracle: by hand, names and counts."""
    rows = [{"turns": ["Hi."], "mood": 1}, {"turns": ["Hi."], "mood": 2, "age": 3}]
    plain = source(tmp_path / "in.jsonl", [{"turns": ["Hi."]}] * 2, vocabulary)
    assert source(tmp_path / "in.jsonl", rows, vocabulary) == plain
    (record,) = caplog.records
    assert "'age' (1 records), 'mood' (2 records)" in record.getMessage()


@pytest.mark.parametrize("kind", ["plain", "gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_compression_and_byte_order_mark(tmp_path, vocabulary, kind, mark):
    """Oracle: the plain file. Spans far apart are read too, whatever the file is called."""
    lines = [json.dumps({"id": str(i), "turns": [f"Hello {i}."]}) for i in range(3000)]
    content = mark + "\n".join(lines).encode()
    packed = {
        "plain": lambda data: data,
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }[kind](content)
    path = tmp_path / "in.jsonl"
    path.write_bytes(packed)
    found = records.source(str(path), vocabulary, 64)
    spans = [record_sources.Span(0, *span) for span in ((0, 2), (1500, 1502), (2999, 3000))]
    names = [[row.id for row in rows] for rows in found.read(spans)]
    assert names == [["0", "1"], ["1500", "1501"], ["2999"]]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_damaged_file_is_one_error(tmp_path, vocabulary, pack):
    """The file is named, and the flag's setting."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(pack(b'{"turns": ["Hi."]}\n' * 1000)[:-15])
    with pytest.raises(UserError, match="cannot be read") as caught:
        records.source(str(path), vocabulary, 64)
    assert str(path) in str(caught.value)
    assert caught.value.settings == ("input",)
