"""Prost's texts. Oracles: ParlAI's recorded histories and labels, hand-made answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmo.engine.base.errors import DataError
from cosmo.tasks.prost_text import (
    VARIANTS,
    ProstExample,
    check_variant,
    gold_prefix_ids,
    history_ids,
    history_text,
    split_answer,
    target_ids,
    target_text,
)
from cosmo.tasks.readers import read_prosocial
from cosmo.tasks.safety import rot_text, split_rots
from cosmo.tasks.vocabularies import RESPONSE_MARK, ROT_MARK, load

pytest.importorskip("tokenizers")

SAMPLE = "tasks/sample/prost/vocabulary.json"
MARKS = (ROT_MARK, RESPONSE_MARK)
RULES = ("It's wrong to lie.", "You should be kind.")
EXAMPLE = ProstExample(("your persona: i cook.\nHi", "Hello"), "Please be honest.", RULES)


@pytest.fixture(scope="module")
def vocabulary():
    return load(SAMPLE)


def test_history_and_target_are_parlais(shared):
    """Oracle: ParlAI 1.7.2's text_vec (64 ids), full_text_vec and label_vec (48 ids)."""
    vocabulary = load(shared / "golden/parlai/model.dict")
    cut = []
    for one in json.loads((shared / "golden/parlai/teacher_forced.json").read_text()):
        turns = tuple(one["context"])
        assert history_text(turns) == one["history_string"]
        assert history_ids(turns, vocabulary) == (one["full_text_vec"], 0)
        found = history_ids(turns, vocabulary, 64)
        assert found.ids == one["text_vec"]
        assert found.dropped == len(one["full_text_vec"]) - len(one["text_vec"])
        cut.append(found.cut)
        example = ProstExample(turns, one["label"])
        assert target_ids(example, vocabulary, "response_only")[:48] == one["label_vec"]
    assert cut == [True, False, False]


def test_history_by_hand(vocabulary):
    """Oracle: the vocabulary on each utterance and on two spaces; the end token is 2."""
    encode = vocabulary.encode
    whole = [*encode(EXAMPLE.turns[0]), *encode("  "), *encode("Hello"), 2]
    assert history_ids(EXAMPLE.turns, vocabulary) == (whole, 0)
    for length in (1, 5, len(whole), len(whole) + 1):
        found = history_ids(EXAMPLE.turns, vocabulary, length)
        assert found == (whole[-length:], max(len(whole) - length, 0))
        assert found.ids[-1] == vocabulary.eos_id
    assert history_ids(["Hello"], vocabulary).ids == [*encode("Hello"), 2]
    assert history_ids([], vocabulary).ids == [2]


def test_targets_by_hand(vocabulary):
    """Oracle: the form in the module's docstring; 1004 and 1005 are the marks' rows."""
    joined = "It's wrong to lie., You should be kind."
    response = [*vocabulary.encode("Please be honest."), 2]
    prefix = [1004, *vocabulary.encode(joined), 1005]
    assert gold_prefix_ids(RULES, vocabulary) == prefix
    assert target_ids(EXAMPLE, vocabulary) == [*prefix, *response]
    assert target_ids(EXAMPLE, vocabulary, "response_only") == response
    assert target_text(EXAMPLE) == f"__rot__ {joined} __response__ Please be honest."
    assert target_text(EXAMPLE, "response_only") == "Please be honest."
    for rots in ((), ("  ",)):
        bare = ProstExample(EXAMPLE.turns, EXAMPLE.response, rots)
        assert gold_prefix_ids(rots, vocabulary) == []
        for variant in VARIANTS:
            assert target_ids(bare, vocabulary, variant) == response
            assert target_text(bare, variant) == "Please be honest."


def test_targets_decode_to_their_text_and_split(vocabulary):
    """Oracle: the texts of the sample's rows, and Canary's rule for RoTs."""
    rows = read_prosocial("tasks/sample/canary/test.jsonl")
    turns = [turn for dialogue in rows for turn in dialogue.turns]
    assert len(turns) > 100
    for turn in turns:
        response = " ".join(turn.response.split())
        example = ProstExample((turn.context,), response, turn.rots)
        for variant in VARIANTS:
            ids, text = target_ids(example, vocabulary, variant), target_text(example, variant)
            assert vocabulary.decode(ids) == text
            with_rots = turn.rots and variant != "response_only"
            rots = split_rots(rot_text(turn.rots)) if with_rots else ()
            assert split_answer(text) == (rots, response, "")


@pytest.mark.parametrize(
    ("answer", "rots", "response", "problem"),
    [
        ("Hello.", (), "Hello.", ""),
        ("__rot__ It's wrong to lie. __response__ Be honest.", RULES[:1], "Be honest.", ""),
        ("__rot__It's wrong to lie.__response__Be honest.", RULES[:1], "Be honest.", ""),
        (f"__rot__ {', '.join(RULES)} __response__ So.", RULES, "So.", ""),
        ("__response__ Be honest.", (), "Be honest.", ""),
        ("__rot__ __response__ Be honest.", (), "Be honest.", ""),
        (
            "__rot__ It's wrong to lie.",
            RULES[:1],
            "",
            "no __response__ after the rules of thumb; no response",
        ),
        ("__rot__", (), "", "no __response__ after the rules of thumb; no response"),
        ("__response__", (), "", "no response"),
        ("__rot__ It's wrong to lie. __response__", RULES[:1], "", "no response"),
        ("", (), "", "no response"),
        ("   ", (), "", "no response"),
        (
            "__rot__ It's wrong to lie. __response__ a __response__ b",
            RULES[:1],
            "a b",
            "__response__ more than once",
        ),
        (
            "It's wrong to lie. __response__ a",
            RULES[:1],
            "a",
            "no __rot__ before the rules of thumb",
        ),
        ("x __rot__ y __response__ a", ("x y",), "a", "text before __rot__"),
        ("__rot__ x __rot__ y __response__ a", ("x y",), "a", "__rot__ more than once"),
        ("__rot__ x __response__ a __rot__ b", ("x",), "a b", "__rot__ more than once"),
    ],
)
def test_answers_are_split(answer, rots, response, problem):
    """Oracle: by hand."""
    assert split_answer(answer) == (rots, response, problem)


@given(st.lists(st.sampled_from(["__rot__", "__response__", "Be kind.", ",", "x", " "])))
def test_no_answer_raises_and_no_mark_is_shown(parts):
    """Oracle: no error; no mark in any part; a problem exactly if a clean answer is not given."""
    answer = split_answer(" ".join(parts))
    shown = " ".join([*answer.rots, answer.response])
    assert "__" not in shown
    assert bool(answer.response) or "no response" in answer.problem


@given(st.lists(st.integers(0, 1010)))
def test_no_ids_raise(ids):
    """Property: whatever tokens a network writes, no mark is in any part of its answer."""
    answer = split_answer(load(SAMPLE).decode(ids))
    assert not any(mark in part for mark in MARKS for part in (*answer.rots, answer.response))


def test_what_cannot_be_written(shared, vocabulary_path):
    """Oracle: the words of the errors; SentencePiece and 504 rows of ParlAI have no spare rows."""
    for path in (vocabulary_path, shared / "golden/parlai/model.dict"):
        vocabulary = load(path)
        check_variant("response_only", vocabulary)
        with pytest.raises(DataError, match="no rows for Prost's marks: got") as caught:
            check_variant("rot_and_response", vocabulary)
        assert caught.value.settings == ("VOCABULARY_PATH", "PROST_VARIANT")
        with pytest.raises(DataError, match="no rows for Prost's marks"):
            target_ids(EXAMPLE, vocabulary)
    with pytest.raises(DataError, match="variant='both': expected one of"):
        check_variant("both", load(SAMPLE))
    check_variant("rot_and_response", load(SAMPLE))
