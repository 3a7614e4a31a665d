"""`python -m canary eval --predictions`: anybody's answers get a row of table 2."""

import json
import pathlib

import pytest

from canary import evaluation, predictions
from canary.__main__ import main
from cosmo.tasks.safety import LABELS

CORPUS = "tasks/sample/canary"
CAUTION = "__needs_caution__"


@pytest.fixture(scope="module")
def cases():
    return list(evaluation.cases(CORPUS, "test"))[:8]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(path, *flags):
    """Run the verb on the first eight contexts; return its exit code."""
    command = ["eval", f"--input={CORPUS}", "--split=test", "--num_examples=8", "--quiet"]
    return main([*command, f"--predictions={path}", *flags])


def test_the_gold_answers_are_all_right(cases, tmp_path, capsys):
    """Oracle: the corpus's own labels and RoTs: 100% everywhere, perplexity e."""
    lines = [
        {
            "id": case.id,
            "label": case.gold.label,
            "probabilities": {name: float(name == case.gold.label) for name in LABELS},
            "rots": list(case.gold.rots),
            "rot_log_likelihood": -3.0 if case.gold.rots else None,
            "rot_tokens": 3 if case.gold.rots else 0,
        }
        for case in cases
    ]
    path = write(tmp_path / "perfect.jsonl", reversed(lines))  # in any order
    assert evaluate(path, f"--output={tmp_path}/out", "--name=Perfect") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Perfect", "100.0", "100.0", "100.0", "100.0", "2.7"] in rows
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["five_labels"]["accuracy"] == 1.0
    assert metrics["calibration"]["error"] == 0.0
    assert metrics["predictions"] == str(path)


def test_a_classifier_and_a_generator(cases, tmp_path, capsys):
    """Oracle: table 2, where BERT has no RoTs and NormTransformer no labels."""
    labels = [{"id": case.id, "label": CAUTION} for case in cases]
    right = sum(case.gold.label == CAUTION for case in cases) / len(cases)
    assert evaluate(write(tmp_path / "bert.jsonl", labels)) == 0
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("bert "))
    assert row[1] == f"{100 * right:.1f}" and row[3:] == ["-", "-", "-"]
    assert "calibration" not in printed and "RoTs written" not in printed
    texts = [{"id": case.id, "rots": "It's wrong to lie."} for case in cases]
    assert evaluate(write(tmp_path / "norms.jsonl", texts)) == 0
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("norms "))
    assert row[1:3] == ["-", "-"] and "-" not in row[3:5] and row[5] == "-"
    assert "predicted" not in printed
    # Probabilities alone give the label.
    sure = [
        {"id": c.id, "probabilities": {n: 0.6 if n == CAUTION else 0.1 for n in LABELS}}
        for c in cases
    ]
    found = predictions.read(write(tmp_path / "sure.jsonl", sure), cases)
    assert [one.label for one in found] == [CAUTION] * 8


def test_our_own_outputs_are_read(canary, run, cases, tmp_path, capsys):
    """Oracle: `eval` of the checkpoint gives the same numbers as the file that it wrote."""
    flags = [f"--input={CORPUS}", "--num_examples=4", "--quiet"]
    command = ["eval", f"--checkpoint={run}", f"--output={tmp_path}/out", "--batch_size=4"]
    assert main([*command, *flags]) == 0
    wanted = json.loads((tmp_path / "out/metrics.json").read_text())
    file = f"--predictions={tmp_path}/out/predictions.jsonl"
    assert main(["eval", file, f"--output={tmp_path}/again", *flags]) == 0
    found = json.loads((tmp_path / "again/metrics.json").read_text())
    assert found["five_labels"] == wanted["five_labels"]
    assert found["rots"] == pytest.approx(wanted["rots"])
    # And those of `canary label`, asked about the contexts.
    contexts = tmp_path / "contexts.jsonl"
    assert main(["eval", f"--contexts={contexts}", *flags]) == 0
    assert "4 contexts" in capsys.readouterr().out
    lines = [json.loads(line) for line in contexts.read_text().splitlines()]
    assert lines == [{"id": c.id, "turns": list(c.turns)} for c in cases[:4]]
    labels = tmp_path / "labels.jsonl"
    command = ["label", f"--checkpoint={run}", f"--input={contexts}", f"--output={labels}"]
    assert main([*command, "--batch_size=4", "--quiet"]) == 0
    chirps = canary.chirp([case.turns for case in cases[:4]])
    found = predictions.read(labels, cases[:4])
    assert [one.label for one in found] == [chirp.label for chirp in chirps]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": "prosocial-test-99999-0"}, "field 'id' is no context's"),
        ({"id": None}, "field 'id' is no id"),
        ({"label": "needs caution"}, "field 'label' has an unknown value"),
        ({"label": None}, "a line with other fields"),
        ({"rots": 3}, "field 'rots' is no text"),
        ({"rots": ["a", None]}, "field 'rots' is no text"),
        ({"rots": None}, "a line with other fields"),
        ({"probabilities": {CAUTION: 1.0}}, "a line with other fields"),
        ({"rot_log_likelihood": 1.0, "rot_tokens": 1}, "'rot_log_likelihood' has a wrong value"),
        ({"rot_log_likelihood": -1e308, "rot_tokens": 1}, "from -1e+09 to 0"),
        ({"rot_log_likelihood": -1.0}, "'rot_tokens' has a wrong value"),
        ({"rot_log_likelihood": float("nan"), "rot_tokens": 1}, "third.jsonl:3"),
    ],
)
def test_bad_lines_are_named(cases, tmp_path, capsys, changes, says):
    """Oracle: the third line is bad: exit code 1; file, line and field in one line."""
    lines = [{"id": case.id, "label": CAUTION, "rots": "Be kind."} for case in cases]
    lines[2] |= changes
    assert evaluate(write(tmp_path / "third.jsonl", lines)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error and "third.jsonl:3" in error


@pytest.mark.parametrize(
    "wrong",
    [
        {CAUTION: 1.0},
        {**dict.fromkeys(LABELS, 0.2), "other": 0.0},
        dict.fromkeys(LABELS, 0.3),
        {**dict.fromkeys(LABELS, 0.5), CAUTION: -1.0},
        dict.fromkeys(LABELS, "0.2"),
        [0.2] * 5,
    ],
)
def test_bad_probabilities(cases, tmp_path, wrong):
    """Oracle: five numbers from 0 with sum 1."""
    path = write(tmp_path / "a.jsonl", [{"id": cases[0].id, "probabilities": wrong}])
    with pytest.raises(ValueError, match="field 'probabilities' has a wrong value"):
        predictions.read(path, cases[:1])


def test_missing_and_doubled_contexts(cases, tmp_path, capsys):
    """Oracle: each context needs one line; a line about a context that is not used may stand."""
    lines = [{"id": case.id, "label": CAUTION} for case in cases]
    assert evaluate(write(tmp_path / "a.jsonl", lines[:-2])) == 1
    assert f"lacks 2 of 8 contexts, such as '{cases[6].id}'" in capsys.readouterr().err
    assert evaluate(write(tmp_path / "a.jsonl", [*lines, lines[0]])) == 1
    assert "line 1 has it" in capsys.readouterr().err
    path = write(tmp_path / "a.jsonl", lines)
    assert len(predictions.read(path, cases, used=3)) == 3
    for flags in (["--checkpoint=x"], ["--against=http://x"]):
        assert evaluate(path, *flags) == 1
        assert "give no other" in capsys.readouterr().err
    pathlib.Path(path).write_text("[1, 2]\n")
    assert evaluate(path) == 1
