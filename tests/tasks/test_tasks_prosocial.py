"""Oracles: the paper's example sentence, hand-made rows, properties of the draw."""

import subprocess
import sys
from pathlib import Path

import pytest

from cosmo.tasks import namebook
from cosmo.tasks.dialogues import ProsocialDialogue, ProsocialTurn
from cosmo.tasks.prosocial import draw_names, prosocial_examples, situation
from cosmo.tasks.readers import read_prosocial


def test_situation_of_the_paper():
    """Oracle: Kim et al. 2023, appendix C, with another name."""
    rots = ["It's wrong to think all men are violent."]
    expected = "Nora is trying to gently convince a friend it's wrong to think all men are violent."
    assert situation("Nora", rots) == expected


@pytest.mark.parametrize(
    ("rots", "clause"),
    [
        (["You should help", "You should help.", "It's rude."], "you should help and it's rude"),
        (["I shouldn't lie."], "I shouldn't lie"),
        (["HIV is not a joke."], "HIV is not a joke"),
        (["Muslims deserve respect."], "Muslims deserve respect"),
        (["New York is not unsafe."], "New York is not unsafe"),
        (["A joke can hurt."], "a joke can hurt"),
        (["It's Bob's choice."], "it's Bob's choice"),
        ([" ", "Don't steal. "], "don't steal"),
    ],
)
def test_rules_of_thumb_as_clauses(rots, clause):
    """Oracle: English, by hand."""
    assert situation("Ann", rots) == f"Ann is trying to gently convince a friend {clause}."


def test_casual_turn_has_a_plain_situation():
    """Oracle: written out by hand."""
    assert situation("Ann", []) == "Ann is having a conversation with a friend."


def test_only_the_guiding_speaker_is_learnt_with_all_earlier_words():
    """Oracle: two exchanges by hand."""
    turns = (
        ProsocialTurn("c0", "r0", ("Be kind.",), "__needs_caution__"),
        ProsocialTurn("c1", "r1", (), "__casual__"),
    )
    first, second = prosocial_examples(ProsocialDialogue("prosocial-train-3", turns))
    guide, other = draw_names("prosocial-train-3")
    assert (first.turns, first.response) == (("c0",), "r0")
    assert (second.turns, second.response) == (("c0", "r0", "c1"), "r1")
    assert first.narrative == f"{guide} is trying to gently convince a friend be kind."
    assert second.narrative == f"{guide} is having a conversation with a friend."
    assert first.instruction == f"Imagine you are {guide} and speak to {other}"
    assert [first.id, second.id] == ["prosocial-train-3-0", "prosocial-train-3-1"]


def test_names_differ_within_a_dialogue_and_cover_the_list():
    """Oracle: Kim et al. 2023, appendix C: the top 1,000; a fair draw of two different names."""
    names = namebook.load().common
    assert len(set(names)) == 1000 and names[0] == "Michael"
    draws = [draw_names(f"prosocial-train-{i}") for i in range(20_000)]
    assert all(guide != other for guide, other in draws)
    assert {guide for guide, _ in draws} == set(names) == {other for _, other in draws}
    assert draw_names("d", 0) != draw_names("d", 1)


def test_names_are_the_same_in_every_process():
    """Oracle: another interpreter with another hash seed."""
    code = (
        "from cosmo.tasks.prosocial import draw_names; print(*draw_names('prosocial-train-5', 7))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env={"PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == list(draw_names("prosocial-train-5", 7))


def test_real_rows(shared):
    """Oracle: the rows, counted by hand: five dialogues, 13 responses, all with rules of thumb."""
    dialogues = list(read_prosocial(shared / "data/prosocial_rows.jsonl"))
    examples = [e for dialogue in dialogues for e in prosocial_examples(dialogue)]
    assert (len(dialogues), len(examples)) == (5, 13)
    assert all("trying to gently convince a friend" in e.narrative for e in examples)
    assert all(not e.narrative.endswith("..") for e in examples)
