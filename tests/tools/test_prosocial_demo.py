"""The demo of a ProsocialDialog: its verdict; and all of it, small, as a slow proof."""

import json
import subprocess
import sys

import pytest

from tools import prosocial_demo


def left(folder, dialogues: int, loss: float):
    """Write what a demo of 10 situations leaves in `folder`."""
    for name in ("situations", "corpus/data", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "situations/situations.jsonl").write_text("{}\n" * 10)
    made = {"ours": {"dialogues": dialogues}, "splits": {"train": dialogues}, "rows": 9}
    (folder / "corpus/report.json").write_text(json.dumps({**made, "workers": 2}))
    row = {"context": "I lied.", "safety_label": "__casual__", "rots": None, "response": "Why?"}
    (folder / "corpus/data/train.jsonl").write_text(json.dumps(row) + "\n")
    rows = [{"step": 0, prosocial_demo.LOSS: 8.0}, {"step": 9, prosocial_demo.LOSS: loss}]
    (folder / "model/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("dialogues", "loss", "fault"),
    [(9, 2.0, None), (8, 2.0, "80% of the situations"), (10, 8.5, "did not learn")],
)
def test_the_verdict(tmp_path, capsys, dialogues, loss, fault):
    """Property: it fails loudly, with the reason, unless dialogues and loss are good."""
    left(tmp_path, dialogues, loss)
    assert prosocial_demo.report(tmp_path, {"corpus": 1.0}) is (fault is None)
    captured = capsys.readouterr()
    assert (fault or "") in captured.err and ("FAILED" in captured.err) is (fault is not None)
    assert "8.000 before" in captured.out


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    """Nothing but an earlier demo is ever emptied."""
    (tmp_path / "precious").write_text("x")
    assert prosocial_demo.main([f"--output={tmp_path}"]) == 1
    assert (tmp_path / "precious").exists()
    assert "is no folder of a prosocial demo" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    """Few steps, twice. Oracle: 60 situations are 60 dialogues; it starts anew the second time."""
    command = [sys.executable, "-m", "tools.prosocial_demo", f"--output={tmp_path}/demo"]
    for _ in "12":
        done = subprocess.run([*command, "--train_steps=4"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "60 situations, 60 dialogues" in done.stdout
    assert f"is kept in {tmp_path}/demo-previous" in done.stdout
