"""Oracles: hand-made files in every shape, and the text that an error must carry."""

import gzip
import json
import logging

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks.readers import Position, group_by_dialogue, read_prosocial, read_soda
from tests.tasks.tasks_samples import prosocial_row, soda_row, write_lines


def _parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_every_format_gives_the_same_dialogues(tmp_path):
    """Oracle: the same rows through another format."""
    rows = [soda_row(i, turns=3 + i) for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    plain = write_lines(tmp_path / "a.jsonl", rows)
    expected = list(read_soda(plain))
    assert [d.dialogue for d in expected] == [tuple(row["dialogue"]) for row in rows]
    assert [d.id for d in expected] == [f"soda-train-{i}" for i in range(4)]

    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.jsonl").write_text("\ufeff" + text.replace("\n", "\n\n"), encoding="utf-8")
    for name in ("b.jsonl.gz", "c.json", "d.jsonl"):
        assert list(read_soda(tmp_path / name)) == expected, name
    assert list(read_soda(_parquet(tmp_path / "e.parquet", rows))) == expected


def test_shards_are_numbered_through(tmp_path):
    """Oracle: ids over two shards by hand."""
    write_lines(tmp_path / "valid-1.jsonl", [soda_row(1)])
    write_lines(tmp_path / "valid-0.jsonl", [soda_row(0)])
    ids = [(d.id, d.narrative) for d in read_soda(tmp_path, "validation")]
    assert ids == [
        ("soda-validation-0", "Nora helps Ben in garden 0."),
        ("soda-validation-1", "Nora helps Ben in garden 1."),
    ]


def _changed(**changes):
    return {**soda_row(), **changes}


def _without(name):
    return {key: value for key, value in soda_row().items() if key != name}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (_without("narrative"), ["'narrative' is missing", "a string"]),
        (_without("speakers"), ["'speakers' is missing", "a list"]),
        (_changed(dialogue="hi"), ["'dialogue' has a wrong type", "str 'hi'", "a list"]),
        (_changed(narrative=3), ["'narrative' has a wrong type", "int 3", "a string"]),
        (_changed(narrative=None), ["'narrative' has a wrong type", "NoneType"]),
        (_changed(speakers=["Nora"] * 3), ["differ in length", "4 utterances and 3 speakers"]),
        (_changed(dialogue=[], speakers=[]), ["'dialogue' is empty", "at least one"]),
        (_changed(dialogue=["a", " ", "b", "c"]), ["'dialogue[1]' is empty"]),
        (_changed(dialogue=["a", 5, "b", "c"]), ["'dialogue[1]' has a wrong type", "int 5"]),
        (_changed(PersonX=5), ["'PersonX' has a wrong type"]),
        (_changed(narrative="\ud800"), ["'narrative' is not valid text"]),
        ([1], ["not a record"]),
        ("text", ["not a record", "an object with named fields"]),
    ],
)
def test_a_bad_soda_record_names_file_line_and_field(tmp_path, row, words):
    """Oracle: the place and the words by hand; the bad record is on line 3."""
    path = write_lines(tmp_path / "train.jsonl", [soda_row(), soda_row()])
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        list(read_soda(path))
    message = str(error.value)
    assert message.startswith(f"{path}:3: "), message
    assert all(word in message for word in [*words, "got ", "expected "]), message


def test_broken_json_line(tmp_path):
    """Oracle: the place by hand."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(soda_row()) + '\n{"narrative": "x", \n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: broken JSON .* expected one JSON"):
        list(read_soda(path))


def test_broken_json_list_gives_the_line(tmp_path):
    """Oracle: the place by hand: the comma is missing on line 3."""
    path = tmp_path / "train.json"
    row = json.dumps(soda_row())
    path.write_text(f"[\n{row}\n{row}\n]")
    with pytest.raises(DataError, match=r"train\.json:3: broken JSON list"):
        list(read_soda(path))
    path.write_text(f"[\n{row},\n{{]\n]")
    with pytest.raises(DataError, match=r"train\.json:3: broken JSON"):
        list(read_soda(path))
    path.write_text(f"[\n{row}\n")
    with pytest.raises(DataError, match="the end of file"):
        list(read_soda(path))
    path.write_text(f"[\n{row}\n]\n{row}\n")
    with pytest.raises(DataError, match=r"train\.json:4: text after the JSON list"):
        list(read_soda(path))


def test_damaged_files(tmp_path):
    """Oracle: a gzip file cut in half, bytes that are not text, no Parquet, an empty file."""
    whole = gzip.compress("".join(json.dumps(soda_row(i)) + "\n" for i in range(500)).encode())
    for name, data, words in (
        ("a.jsonl.gz", whole[: len(whole) // 2], "cut short"),
        ("b.jsonl", b'{"a": "\xff\xfe"}', "not a text file"),
        ("c.parquet", b"PAR1 nothing", "Parquet file is damaged"),
        ("d.jsonl", b"", "holds no record"),
    ):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words) as error:
            list(read_soda(tmp_path / name))
        assert name in str(error.value)


def test_bad_parquet_row_is_numbered(tmp_path):
    """Oracle: the row by hand."""
    rows = [soda_row(), {**soda_row(), "speakers": ["Nora"]}]
    path = _parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(DataError, match=r"train\.parquet:2: row of a Parquet file: .*differ"):
        list(read_soda(path))


def test_rows_of_a_dialogue_are_joined(tmp_path):
    """Oracle: by hand, with a dialogue number used twice in a row."""
    rows = [prosocial_row(0, 0), prosocial_row(0, 1), prosocial_row(0, 0), prosocial_row(1, 0)]
    path = write_lines(tmp_path / "train.json", rows)
    dialogues = list(read_prosocial(path))
    assert [d.id for d in dialogues] == [f"prosocial-train-{i}" for i in range(3)]
    assert [len(d.turns) for d in dialogues] == [2, 1, 1]
    assert dialogues[0].turns[1].context == "I was rude today 0 1"
    assert dialogues[0].turns[0].rots == ("It's wrong to be rude.",)


def test_rows_are_grouped_by_dialogue():
    """Oracle: by hand: a hole stays inside; another number, a jump back, an end and a row without a
    place each begin another group.
    """
    rows = [(0, 0), (0, 2), (1, 3), (1, 3), (1, 0), None, (1, 1), (1, 2, True), (1, 3)]
    groups = group_by_dialogue(rows, lambda row: row and Position(*row, *[False] * (3 - len(row))))
    ends = [list(group)[-1] for group in groups]
    assert ends == [(0, 2), (1, 3), (1, 3), (1, 0), None, (1, 2, True), (1, 3)]


def test_incomplete_dialogues_are_counted_and_not_used(tmp_path, caplog):
    """Oracle: by hand: dialogue 7 lacks its start, dialogue 8 a middle row, 9 is whole."""
    rows = [prosocial_row(7, 2), prosocial_row(7, 3)]
    rows += [prosocial_row(8, 0), prosocial_row(8, 2), prosocial_row(9, 0, done=True)]
    path = write_lines(tmp_path / "train.json", rows)
    with caplog.at_level(logging.WARNING):
        dialogues = list(read_prosocial(path))
    assert [(d.id, len(d.turns)) for d in dialogues] == [("prosocial-train-2", 1)]
    assert f"{path}: 2 incomplete dialogues are not used" in caplog.text


def test_a_dialogue_goes_on_in_the_next_shard(tmp_path, caplog):
    """Oracle: by hand: one dialogue cut by the edge of a file; one that had ended before it."""
    write_lines(tmp_path / "train-0.json", [prosocial_row(0, 0), prosocial_row(1, 0)])
    write_lines(tmp_path / "train-1.json", [prosocial_row(1, 1, done=True)])
    write_lines(tmp_path / "train-2.json", [prosocial_row(1, 2), prosocial_row(2, 0)])
    with caplog.at_level(logging.WARNING):
        dialogues = list(read_prosocial(tmp_path))
    assert [len(d.turns) for d in dialogues] == [1, 2, 1]
    assert "train-2.json: 1 incomplete" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"safety_label": "__fine__"}, ["'safety_label' has an unknown value", "__casual__"]),
        ({"rots": "one"}, ["'rots' has a wrong type", "a list"]),
        ({"response": ""}, ["'response' is empty"]),
        ({"response_id": "1"}, ["'response_id' has a wrong type", "an integer"]),
        ({"dialogue_id": True}, ["'dialogue_id' has a wrong type"]),
        ({"episode_done": "no"}, ["'episode_done' has a wrong type"]),
    ],
)
def test_a_bad_prosocial_row(tmp_path, changes, words):
    """Oracle: the place and the words by hand."""
    rows = [prosocial_row(0, 0), {**prosocial_row(0, 1), **changes}]
    path = write_lines(tmp_path / "train.json", rows)
    with pytest.raises(DataError) as error:
        list(read_prosocial(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert all(word in str(error.value) for word in words)


def test_rots_may_be_null_or_blank(tmp_path):
    """Oracle: the published corpus has null and empty lists in casual rows."""
    rows = [prosocial_row(i, 0, rots=rots) for i, rots in enumerate((None, [], [" "]))]
    dialogues = list(read_prosocial(write_lines(tmp_path / "train.json", rows)))
    assert [d.turns[0].rots for d in dialogues] == [(), (), ()]


def test_direct_download_equals_the_hub_rows(shared):
    """Oracle: the hub's real rows of the same two dialogues."""
    nested = list(read_prosocial(shared / "data/prosocial_direct_download.json"))
    rows = list(read_prosocial(shared / "data/prosocial_rows.jsonl"))
    assert len(nested) == 2
    assert all(dialogue.turns in [d.turns for d in rows] for dialogue in nested)


def test_a_bad_nested_row_gives_line_dialogue_and_row(tmp_path):
    """Oracle: the place by hand: the second dialogue begins on line 4."""
    row = {"text": "c", "labels": ["r"], "rots": [], "safety_label": "__casual__"}
    bad = {**row, "labels": []}
    path = tmp_path / "train.json"
    path.write_text(f"[\n[{json.dumps(row)}],\n\n[{json.dumps(row)}, {json.dumps(bad)}]]")
    with pytest.raises(DataError, match=r"train\.json:4: dialogue 2, row 2: field 'labels'"):
        list(read_prosocial(path))


def test_real_rows_through_parquet(tmp_path, shared):
    """Oracle: the JSON reading of the same real rows."""
    for name, read in (("soda_rows", read_soda), ("prosocial_rows", read_prosocial)):
        source = shared / f"data/{name}.jsonl"
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        path = _parquet(tmp_path / f"{name}.parquet", rows)
        assert list(read(path)) == list(read(source))
