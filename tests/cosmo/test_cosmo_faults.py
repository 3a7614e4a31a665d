"""What the verbs do about a damaged checkpoint, and what a start with leftovers makes of them."""

import json
import os
import pathlib
import shutil
import signal
import threading
import time

import pytest

from cosmo.__main__ import main
from cosmo.engine.base.command_line import guarded
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import only_writer
from cosmo.engine.train.metric_files import MetricWriter


@pytest.fixture
def damaged(trained, tmp_path):
    """A run of 8 steps whose newest checkpoint lost a bit."""
    folder = pathlib.Path(shutil.copytree(trained, tmp_path / "run"))
    path = max((folder / "checkpoints/8").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return folder


@pytest.mark.parametrize("verb", ["infer", "eval", "export"])
def test_a_damaged_checkpoint_that_is_named_is_refused(damaged, tmp_path, capsys, verb):
    """Property: exit code 1, one line that names it; no other is used in its stead."""
    checkpoint = damaged / "checkpoints/8"
    arguments = {
        "infer": ["--input=tasks/sample/questions.jsonl", f"--output={tmp_path}/out.jsonl"],
        "eval": [f"--gin.EVAL_OUTPUT_DIR={tmp_path}/out"],
        "export": ["--format=hf", f"--checkpoint={checkpoint}", f"--output={tmp_path}/out"],
    }[verb]
    if verb != "export":
        arguments += [f"--gin.MODEL_DIR={damaged}", f"--gin.CHECKPOINT_PATH={checkpoint}"]
    assert main([verb, *arguments]) == 1
    error = capsys.readouterr().err
    assert f"error: checkpoint {checkpoint} is damaged: state/" in error
    assert "has another checksum than was written" in error


def test_of_a_run_the_checkpoint_before_is_exported(damaged, tmp_path, caplog, capsys):
    """Property: said, not silent; the run's folder is left as it is."""
    arguments = ["--format=hf", f"--checkpoint={damaged}", f"--output={tmp_path}/out"]
    assert main(["export", *arguments]) == 0
    assert "step 4" in capsys.readouterr().out
    assert "checkpoints/8 is damaged and not used" in caplog.text
    assert (damaged / "checkpoints/8").exists()


def test_a_start_that_left_no_checkpoint_leaves_no_lines(tmp_path):
    """Steps of a starting checkpoint count: lines of an attempt that left none go all the same.
    Oracle: the file of a first start."""
    for _ in range(2):
        board = MetricWriter(str(tmp_path))  # train.train begins at 0 unless it resumes
        board.write(1_100_000, {"eval/x": 1.0})
        board.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1_100_000]


def test_a_full_disk_under_tensorboard_is_one_error(tmp_path, monkeypatch):
    """Oracle: a UserError that names the folder, once; no thread that could print another."""
    threads = threading.enumerate()
    board = MetricWriter(str(tmp_path))
    board.write(1, {"eval/x": 1.0})

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"{tmp_path}/tensorboard: No space left on device"):
        board.flush()
    with pytest.raises(UserError, match="tensorboard"):
        board.close()
    board.close()
    assert threading.enumerate() == threads


def test_sigterm_by_the_command_line(small, tmp_path, capsys):
    """Property: exit code 0, the step is printed and is the newest checkpoint; the same command
    goes on to the end."""
    metrics = tmp_path / "metrics.jsonl"

    def terminate():
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    command = ["train", *small, f"--gin.MODEL_DIR={tmp_path}", "--gin.EVAL_PERIOD=None"]
    command += ["--gin.CHECKPOINT_PERIOD=1000", "--gin.TRAIN_STEPS=300"]
    threading.Thread(target=terminate, daemon=True).start()
    assert main(command) == 0
    said = capsys.readouterr().out
    step = int(said.split("stopped by SIGTERM: step ")[1].split()[0])
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [step]
    assert main([*command, f"--gin.TRAIN_STEPS={step + 2}"]) == 0
    assert f"done: step {step + 2}" in capsys.readouterr().out


def test_a_folder_in_use_is_refused(small, tmp_path, capsys):
    """Two runs in one folder would spoil each other's checkpoints. Oracle: the holder is named."""
    with only_writer(tmp_path):
        code = main(["train", *small, f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=1"])
    error = capsys.readouterr().err
    assert code == 1 and f"{tmp_path} is in use by process {os.getpid()}" in error
    assert "(--gin.MODEL_DIR)" in error
    assert not (tmp_path / "metrics.jsonl").exists()


def test_ctrl_c_while_a_library_loads_is_no_error(capsys):
    """NumPy's C++ side turns it into an ImportError. Oracle: exit code 130, one word."""

    def run():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy._core.multiarray failed to import")  # noqa: B904

    assert guarded(run) == 130
    assert capsys.readouterr().err == "interrupted\n"
