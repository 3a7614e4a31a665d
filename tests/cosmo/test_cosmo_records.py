"""Plain records to rows."""

import pytest

from cosmo import records
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


def test_one_endless_turn_keeps_its_end_and_eos(vocabulary):
    """Property: the newest words are what is answered."""
    row = records.row({"turns": ["word " * 200 + "finally"]}, vocabulary, 16)
    assert len(row.input_ids) == 16
    assert row.input_ids[-1] == 1
    assert vocabulary.decode(row.input_ids).endswith("finally")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ([], "object"),
        ({}, "turns"),
        ({"turns": "hello"}, "turns"),
        ({"turns": ["a", ""]}, "turns"),
        ({"turns": ["a"], "narrative": 3}, "narrative"),
        ({"turns": ["a"], "situation": "x"}, "situation"),
        ({"turns": ["a"], "response": ["x"]}, "response"),
    ],
)
def test_bad_records_name_the_field(vocabulary, record, field):
    """Every mistake says which field it is in."""
    with pytest.raises(ValueError, match=field):
        records.row(record, vocabulary, 64)
