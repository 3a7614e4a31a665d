"""The quickstart's arithmetic, its verdict, and the plot."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from cosmo import plot
from cosmo.__main__ import main
from cosmo.cli import quickstart
from cosmo.engine.base import demo
from cosmo.engine.base.errors import UserError
from cosmo.tasks import vocabularies
from cosmo.tasks.formatting import Example

ROOT = pathlib.Path(__file__).resolve().parents[2]


def example(response: str) -> Example:
    return Example("x", "", "", ("hi",), response)


def test_unigram_perplexity_by_hand():
    """Oracle: add-one smoothed counts on paper. Training tokens a a EOS, held out a EOS."""
    vocabulary = vocabularies.load("tasks/sample/vocabulary.model")
    (token,) = vocabulary.encode("the")
    assert token > 2
    total = 3 + vocabulary.size
    expected = math.exp(-(math.log(3 / total) + math.log(2 / total)) / 2)
    found = quickstart.unigram_perplexity([example("the the")], [example("the")], vocabulary)
    assert found == pytest.approx(expected)


def run_folder(tmp_path, perplexity: float, echo: bool):
    """Write the files of a finished run, with answers that are right (`echo`) or all wrong."""
    rows = [
        {"step": 0, "eval/all/loss": 8.0, "eval/all/perplexity": 3000.0},
        {"step": 5, "train/loss": 4.0},
        {"step": 9, "eval/all/loss": math.log(perplexity), "eval/all/perplexity": perplexity},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval").mkdir()
    for task in ("soda", "prosocial_dialog"):
        lines = [
            {
                "inputs": "A story. <sep> Imagine <sep> One. <turn> Two.",
                "targets": f"answer {i}",
                "prediction": f"answer {i}" if echo else "zzz",
            }
            for i in range(9)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "eval" / f"{task}-predictions.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("perplexity", "echo", "learnt"),
    [(5.0, True, True), (200.0, True, False), (5.0, False, False)],
    ids=["learnt", "perplexity too high", "answers no better than a constant"],
)
def test_the_verdict(tmp_path, capsys, perplexity, echo, learnt):
    """Property: it fails loudly unless perplexity and F1 both show learning."""
    folder = run_folder(tmp_path, perplexity, echo)
    assert quickstart.report(folder, 1.0) is learnt
    captured = capsys.readouterr()
    assert ("FAILED" in captured.err) is not learnt
    assert "- One." in captured.out
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    """Nothing but an earlier run of its own is ever emptied. Oracle: the files are still there."""
    (tmp_path / "checkpoints").mkdir()  # somebody's own run
    (tmp_path / "config.gin").write_text("SODA_PATH = '/data/soda'\n")
    assert main(["quickstart", f"--output={tmp_path}"]) == 1
    assert (tmp_path / "config.gin").exists()
    assert "is no folder of a quickstart" in capsys.readouterr().err


@pytest.mark.parametrize(
    "left",
    [[], [".lock"], [".lock", "config.gin"], [".lock", "checkpoints", ".config.gin.partial"]],
    ids=["nothing", "a lock", "settings", "half a file"],
)
def test_the_default_folder_of_a_start_that_crashed_is_made_anew(tmp_path, monkeypatch, left):
    """Oracle: an empty folder with the marker, whatever a start of any version left there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / quickstart.OUTPUT
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).write_text("x")
    for _ in range(2):
        with demo.demo_folder(quickstart.OUTPUT, "quickstart", quickstart.OUTPUT) as made:
            assert {p.name for p in made.iterdir()} == {demo.MARKER, demo.LOCK}
        (made / "notes.txt").write_text("x")  # in a folder of its own everything goes


def test_a_finished_demo_is_kept_beside_the_next_one(tmp_path, capsys):
    """Oracle: the file of the last finished start, after a finished and an interrupted one."""
    path = str(tmp_path / "demo")
    for text in ("first", "second"):
        with demo.demo_folder(path, "quickstart", "") as folder:
            (folder / "notes.txt").write_text(text)
    with pytest.raises(KeyboardInterrupt), demo.demo_folder(path, "quickstart", ""):
        raise KeyboardInterrupt
    with demo.demo_folder(path, "quickstart", ""):
        pass
    previous = tmp_path / "demo-previous"
    assert (previous / "notes.txt").read_text() == "second"
    said = capsys.readouterr().out
    assert f"is kept in {previous}" in said and "an unfinished quickstart left" in said


def test_a_folder_of_somebody_is_not_replaced_by_a_finished_demo(tmp_path):
    """Oracle: the file of somebody in the folder that a finished demo would be renamed to."""
    with demo.demo_folder(str(tmp_path / "demo"), "quickstart", ""):
        pass
    (tmp_path / "demo-previous").mkdir()
    (tmp_path / "demo-previous" / "thesis.tex").write_text("x")
    again = demo.demo_folder(str(tmp_path / "demo"), "quickstart", "")
    with pytest.raises(UserError, match="is no folder of a quickstart: rename it"), again:
        pass
    assert (tmp_path / "demo-previous" / "thesis.tex").exists()
    assert (tmp_path / "demo" / demo.FINISHED).exists()


@pytest.mark.parametrize("name", ["thesis.tex", ".git"])
def test_a_default_folder_with_a_file_of_somebody_is_left_alone(tmp_path, monkeypatch, name):
    """Oracle: the file, hidden or not."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / quickstart.OUTPUT
    folder.mkdir(parents=True)
    (folder / name).write_text("x")
    made = demo.demo_folder(quickstart.OUTPUT, "quickstart", quickstart.OUTPUT)
    with pytest.raises(UserError, match=f"holds {re.escape(name)}"), made:
        pass
    assert (folder / name).exists()


@pytest.mark.parametrize("lock", [".lock", demo.LOCK])
def test_a_demo_that_still_runs_keeps_its_files(tmp_path, monkeypatch, lock):
    """Oracle: the locks that training and the demo itself hold."""
    monkeypatch.chdir(tmp_path)
    with demo.demo_folder(quickstart.OUTPUT, "quickstart", quickstart.OUTPUT) as folder:
        (folder / "checkpoints").mkdir()
    code = "import sys, time, pathlib; from cosmo.engine.base.folders import only_writer\n"
    code += "with only_writer(pathlib.Path(sys.argv[1]), name=sys.argv[2]):\n"
    code += "    print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), lock],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    again = demo.demo_folder(quickstart.OUTPUT, "quickstart", quickstart.OUTPUT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by process"), again:
            pass
    finally:
        holder.kill()
        holder.wait()
    assert (folder / "checkpoints").exists()


def test_plot_names_what_is_missing(tmp_path, capsys):
    """One line: which file, what is wrong with it."""
    assert plot.main([str(tmp_path)]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n')
    assert plot.main([str(tmp_path)]) == 1
    assert "metrics.jsonl:2" in capsys.readouterr().err
