"""The demo's verdict and what it shows. Training itself is `python -m canary demo`."""

import json

import pytest

from canary.cli import demo
from canary.cli.program import PROGRAM
from canary.evaluation import Case, cases
from canary.report import Gold
from cosmo.engine.base import command_line
from cosmo.engine.base import demo as base_demo
from cosmo.engine.base.demo import LOCK, MARKER, demo_folder
from cosmo.engine.base.errors import UserError
from cosmo.tasks.safety import LABELS


def a_folder(tmp_path, accuracy: float, f1: float):
    """What `train` and `eval` leave of a model with these numbers, beside a baseline of F1 0.2."""
    folder = tmp_path / "canary_eval"
    folder.mkdir()
    made = {
        "five_labels": {"accuracy": accuracy},
        "rots": {"f1": f1},
        "baseline": {"label": "__casual__", "rots": "Be kind.", "accuracy": 0.4, "f1": 0.2},
    }
    (folder / "metrics.json").write_text(json.dumps(made))
    lines = [
        {
            "id": case.id,
            "probabilities": dict(zip(LABELS, (0.6, 0.1, 0.1, 0.1, 0.1), strict=True)),
            "rot_text": "",
        }
        for case in cases(demo.SAMPLE, demo.SPLIT)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("accuracy", "f1", "learnt"),
    [(0.85, 0.41, True), (0.849, 0.9, False), (0.99, 0.4, False)],
    ids=["learnt", "labels too bad", "RoTs no better than twice the most frequent"],
)
def test_the_verdict(tmp_path, capsys, accuracy, f1, learnt):
    """Property: it fails loudly unless labels and RoTs both show learning."""
    assert demo.report(a_folder(tmp_path, accuracy, f1), 1.0, 2.0) is learnt
    captured = capsys.readouterr()
    assert ("FAILED" in captured.err) is not learnt
    assert "Be kind." in captured.out and "0.200" in captured.out
    assert captured.out.count("corpus: __casual__") >= 3


def test_the_three_dialogues_are_of_three_kinds():
    """Property: their gold labels."""
    calming, emergency, small_talk = (
        [case.gold.label for case in dialogue]
        for dialogue in demo.examples(list(cases(demo.SAMPLE, demo.SPLIT)))
    )
    assert calming[0].endswith("caution__") and calming[-1] == "__casual__"
    assert set(emergency) == {"__needs_intervention__"}
    assert set(small_talk) == {"__casual__"}
    only = Case("prosocial-test-0-0", ("Hi!",), Gold("__casual__", ()))
    with pytest.raises(UserError, match="no dialogue that goes from caution to casual"):
        demo.examples([only])


def test_a_dialogue_is_shown_turn_by_turn():
    """Oracle: the text, written by hand."""
    dialogue = [
        Case("d-0", ("I lied.",), Gold("__needs_caution__", ("It's wrong to lie.",))),
        Case("d-1", ("I lied.", "Why?", "Sorry!"), Gold("__casual__", ())),
    ]
    sure = dict(zip(LABELS, (0.0, 0.0, 0.25, 0.75, 0.0), strict=True))
    lines = {
        "d-0": {"probabilities": sure, "rot_text": "Be honest."},
        "d-1": {"probabilities": sure, "rot_text": ""},
    }
    assert demo.dialogue_text(dialogue, lines) == (
        "  A: I lied.\n"
        "       model:  __needs_caution__ 0.75, __probably_needs_caution__ 0.25\n"
        "               Be honest.\n"
        "       corpus: __needs_caution__ It's wrong to lie.\n"
        "  B: Why?\n"
        "  A: Sorry!\n"
        "       model:  __needs_caution__ 0.75, __probably_needs_caution__ 0.25\n"
        "               (no RoT)\n"
        "       corpus: __casual__"
    )


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Nothing but an earlier demo is ever emptied: not a run on another corpus either."""
    (tmp_path / "precious").write_text("x")
    for settings in (None, "PROSOCIAL_PATH = 'data/prosocial_dialog'\n"):
        if settings:
            (tmp_path / "config.gin").write_text(settings)
        with pytest.raises(UserError, match="is no folder of a canary demo"):
            demo.run(command_line.parse(PROGRAM, ["demo", f"--output={tmp_path}"]))
        assert (tmp_path / "precious").exists()


def test_an_earlier_demo_makes_room(tmp_path):
    """Oracle: an empty folder, whatever a marked one held."""
    for _ in range(2):
        with demo_folder(str(tmp_path / "demo"), "canary demo", demo.OUTPUT) as folder:
            assert {p.name for p in folder.iterdir()} == {MARKER, LOCK}
        (folder / "anything").write_text("x")


def test_each_stage_is_a_command_and_a_failure_ends_it(tmp_path, monkeypatch):
    """Property: the commands, in order, and the exit code of the one that fails."""
    commands = []

    class Ended:
        returncode = 0

    def run(command):
        commands.append(command[2:5])
        Ended.returncode = 3 if command[2] == "canary" else 0
        return Ended

    monkeypatch.setattr(base_demo.subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        demo.run(
            command_line.parse(PROGRAM, ["demo", f"--output={tmp_path / 'new'}", "--train_steps=3"])
        )
    assert stop.value.code == 3
    assert [command[:2] for command in commands] == [["cosmo", "train"], ["canary", "eval"]]
    assert commands[0][2] == "--gin_file=gin/canary/canary_tiny.gin"
