"""`python -m canary eval`: which cases are measured, and where its numbers come from."""

import json

import numpy as np
import pytest

from canary import evaluation
from canary.__main__ import main
from cosmo.engine.data import datasets
from cosmo.engine.infer import infer
from cosmo.tasks import safety

VOTES = {
    "__casual__": ["casual"] * 3,
    "__needs_caution__": ["needs caution"] * 3,
    "__needs_intervention__": ["casual", "casual", "needs intervention"],
}


def row(dialogue, place, label, rots):
    return {
        "context": f"I say {dialogue} and {place}.",
        "response": "Oh, why?",
        "rots": rots,
        "safety_label": label,
        "safety_annotations": VOTES[label],
        "dialogue_id": dialogue,
        "response_id": place,
        "episode_done": place == 1,
    }


ROWS = [
    row(0, 0, "__needs_caution__", ["It's wrong to lie.", "You should be kind."]),
    row(0, 1, "__casual__", ["It's good to talk."]),
    row(1, 0, "__needs_intervention__", ["You should call for help."]),
    row(1, 1, "__casual__", None),
]


@pytest.fixture
def corpus(tmp_path):
    """A folder with the rows as test split, and a training split with a most frequent answer."""
    lines = [json.dumps(r) + "\n" for r in ROWS]
    (tmp_path / "test.jsonl").write_text("".join(lines))
    (tmp_path / "train.jsonl").write_text("".join([lines[2], *lines[2:]]))
    return tmp_path


def test_cases_are_the_dialogue_so_far(corpus):
    """Oracle: by hand. A casual context has no RoTs, whatever the row says."""
    found = list(evaluation.cases(str(corpus), "test"))
    assert [len(case.turns) for case in found] == [1, 3, 1, 3]
    assert found[1].turns == ("I say 0 and 0.", "Oh, why?", "I say 0 and 1.")
    assert [case.gold.label for case in found] == [r["safety_label"] for r in ROWS]
    assert [len(case.gold.rots) for case in found] == [2, 0, 1, 0]


def test_gold_rots_are_scored_after_the_gold_label(canary, corpus):
    """Oracle: teacher-forced scores of target and label alone, by `infer.scoring`."""
    cases = list(evaluation.cases(str(corpus), "test"))
    found = evaluation.measure(canary, cases, canary.decoding())
    for case, one, chirp in zip(cases, found, canary.chirp([c.turns for c in cases]), strict=True):
        assert (one.label, one.rot_text) == (chirp.label, chirp.rot_text)
        if not case.gold.rots:
            assert (one.rot_log_likelihood, one.rot_tokens) == (None, 0)
            continue
        context = canary.context(case.turns)
        label = canary.session.vocabulary.encode(safety.label_text(case.gold.label, canary.style))
        rots = (*canary.session.vocabulary.encode(", ".join(case.gold.rots)), 1)
        rows = [
            datasets.Row(str(i), "", context.input_ids, "", targets)
            for i, targets in enumerate([(*label, *rots), tuple(label)])
        ]
        both, alone = infer.answer(canary.session, rows, infer.scoring(canary.session))
        kept = canary.session.lengths["targets"] - len(label)
        assert one.rot_tokens == min(len(rots), kept)
        np.testing.assert_allclose(
            one.rot_log_likelihood, both.scores[0] - alone.scores[0], rtol=1e-4
        )


def test_the_verb_writes_what_it_prints(run, corpus, tmp_path, capsys):
    """Oracle: the counts of the rows; canary.report makes the numbers, and has its own tests."""
    out = tmp_path / "out"
    command = ["eval", f"--checkpoint={run}", f"--input={corpus}", "--quiet", "--batch_size=4"]
    assert main([*command, f"--output={out}"]) == 0
    printed = capsys.readouterr().out
    assert "Canary (Delphi)" in printed
    assert "the most frequent answer" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["examples"], metrics["rots"]["examples"]) == (4, 2)
    assert metrics["baseline"]["label"] == "__needs_intervention__"
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["gold"]["label"] for line in lines] == [r["safety_label"] for r in ROWS]
    right = sum(line["label"] == line["gold"]["label"] for line in lines)
    assert metrics["five_labels"]["accuracy"] == right / 4
    assert main([*command, f"--output={out}", "--num_examples=3"]) == 0
    assert json.loads((out / "metrics.json").read_text())["examples"] == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"safety_annotations": ["casual"] * 2}, "2 votes"),
        ({"safety_annotations": ["casual", "casual", "fine"]}, "unknown vote 'fine'"),
        ({"safety_annotations": ["casual"] * 3}, "contradicts"),
        ({"safety_label": "__fine__"}, "safety_label"),
        ({"context": " "}, "field 'context' is empty"),
    ],
)
def test_bad_rows_are_named(run, tmp_path, capsys, changes, says):
    """Exit code 1; file, line and field in one line."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({**ROWS[0], **changes}) + "\n")
    assert main(["eval", f"--checkpoint={run}", f"--input={path}", "--quiet"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error
    assert "bad.jsonl:1" in error


def test_a_file_of_another_corpus_is_named(run, tmp_path, capsys):
    """Exit code 1, and what the file looks like."""
    path = tmp_path / "soda.jsonl"
    path.write_text(json.dumps({"narrative": "n", "dialogue": ["a"], "speakers": ["A"]}) + "\n")
    assert main(["eval", f"--checkpoint={run}", f"--input={path}", "--quiet"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path} looks like SODA, not like ProsocialDialog. ")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("input", "got the folder {path} with ['x.md'], expected"),
        ("checkpoint", "no checkpoint in {path}"),
    ],
)
def test_an_error_names_flags_not_gin_settings(run, corpus, tmp_path, capsys, flag, says):
    """Oracle: the flags of the help page; no verb takes a gin setting."""
    path = tmp_path / "other"
    path.mkdir()
    (path / "x.md").write_text("")
    flags = {"checkpoint": run, "input": corpus} | {flag: path}
    assert main(["eval", "--quiet", *(f"--{k}={v}" for k, v in flags.items())]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert says.format(path=path) in error
    assert f"(--{flag})" in error and "gin:" not in error


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        (ROWS[1:2], [], "nothing to measure: no dialogue has all its rows"),
        (ROWS, ["--num_examples=0"], "--num_examples is 0"),
        (
            ROWS,
            ["--output=/dev/null/x"],
            "/dev/null/x cannot be written to (Not a directory); give another folder (--output)",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(run, tmp_path, capsys, rows, flags, says):
    """Exit code 1, before the model is opened."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["eval", f"--checkpoint={run}", f"--input={path}", "--quiet", *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error and "--gin" not in error
