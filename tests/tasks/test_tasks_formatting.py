"""Oracles: the published input format, hand-made dialogues, brute force for the trimming."""

import json

import pytest

from cosmo.tasks.dialogues import SodaDialogue
from cosmo.tasks.formatting import (
    Separators,
    cosmo_input,
    drop_oldest_turns,
    instruction,
    soda_examples,
)
from cosmo.tasks.readers import read_soda
from cosmo.tasks.vocabularies import load


def test_published_format_word_for_word():
    """Oracle: the format of the released Cosmo models."""
    role = instruction("Madeleine", "her coach")
    assert role == "Imagine you are Madeleine and speak to her coach"
    text = cosmo_input("She won.", role, ["Hi!", "Hello."])
    assert text == f"She won. <sep> {role} <sep> Hi! <turn> Hello."


@pytest.mark.parametrize(
    ("narrative", "role", "turns", "expected"),
    [
        ("", "R", ["a", "b"], "R <sep> a <turn> b"),
        ("N", "", ["a"], "N <sep> a"),
        ("", "", ["a", "b", "c"], "a <turn> b <turn> c"),
        ("N", "R", [], "N <sep> R"),
        ("", "", [], ""),
    ],
)
def test_an_empty_part_goes_with_its_separator(narrative, role, turns, expected):
    """Oracle: written out by hand."""
    assert cosmo_input(narrative, role, turns) == expected


def test_separators_need_white_space_around():
    """Oracle: the rule that keeps pieces from crossing parts."""
    assert cosmo_input("N", "", ["a", "b"], Separators(" | ", "\n")) == "N | a\nb"
    with pytest.raises(ValueError, match="white space"):
        Separators(sep="<sep>")


def test_every_utterance_after_the_first_is_a_target():
    """Oracle: three utterances written out by hand."""
    dialogue = SodaDialogue("soda-train-17", "N", ("a", "b", "c"), ("Ann", "Bo", "Ann"))
    first, second = soda_examples(dialogue)
    assert (first.id, first.turns, first.response) == ("soda-train-17-1", ("a",), "b")
    assert first.instruction == "Imagine you are Bo and speak to Ann"
    assert (second.id, second.turns, second.response) == ("soda-train-17-2", ("a", "b"), "c")
    assert second.instruction == "Imagine you are Ann and speak to Bo"
    assert {first.narrative, second.narrative} == {"N"}


def test_listener_is_the_last_other_voice():
    """Oracle: three speakers by hand; one who speaks twice; one who speaks alone."""

    def roles(*speakers):
        texts = tuple("u" for _ in speakers)
        return [e.instruction for e in soda_examples(SodaDialogue("d", "", texts, speakers))]

    assert roles("A", "B", "C", "A")[1:] == [instruction("C", "B"), instruction("A", "C")]
    assert roles("A", "A", "B") == [instruction("A", "B"), instruction("B", "A")]
    assert roles("A", "A") == [""]


def test_one_utterance_gives_no_example():
    """Oracle: the definition of an example."""
    assert list(soda_examples(SodaDialogue("d", "N", ("a",), ("A",)))) == []


def test_dropping_oldest_turns_equals_trying_every_suffix():
    """Oracle: brute force over all suffixes and budgets, counting words."""
    turns = ["a b c", "d", "e f", "g h i j"]

    def count(text):
        return len(text.split())

    for narrative in ("", "n n n"):
        for budget in range(1, 30):
            fitting = [
                turns[i:]
                for i in range(len(turns))
                if count(cosmo_input(narrative, "R", turns[i:])) + 1 <= budget
            ]
            expected = max(fitting, key=len, default=turns[-1:])
            got = drop_oldest_turns(narrative, "R", turns, budget, count)
            assert got == tuple(expected), budget


def test_real_dialogues_keep_their_newest_words(shared, t5_vocabulary):
    """Oracle: on real rows with T5's vocabulary, the kept input fits, one more turn would not."""
    vocabulary = load(t5_vocabulary)

    def count(text):
        return len(vocabulary.encode(text))

    trimmed = 0
    for dialogue in read_soda(shared / "data/soda_rows.jsonl"):
        for example in soda_examples(dialogue):
            fixed = (example.narrative, example.instruction)
            for budget in (96, 160, 256):
                kept = drop_oldest_turns(*fixed, example.turns, budget, count)
                assert kept == example.turns[-len(kept) :]
                if len(kept) > 1:
                    assert count(cosmo_input(*fixed, kept)) + 1 <= budget
                if len(kept) < len(example.turns):
                    trimmed += 1
                    longer = example.turns[-len(kept) - 1 :]
                    assert count(cosmo_input(*fixed, longer)) + 1 > budget
    assert trimmed > 50


def test_real_rows_examples(shared):
    """Oracle: the rows themselves, read by json alone."""
    path = shared / "data/soda_rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    examples = [e for dialogue in read_soda(path) for e in soda_examples(dialogue)]
    assert len(examples) == sum(len(row["dialogue"]) - 1 for row in rows)
    assert len({e.id for e in examples}) == len(examples)
    assert examples[0].response == rows[0]["dialogue"][1]
    assert examples[0].instruction == "Imagine you are Priest and speak to Veda"
