"""`python -m cosmo train` from a cache, by real processes: killed many times, and two at once."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from cosmo.__main__ import main
from cosmo.engine.checkpoints import any_format
from tests import warm_process

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATES = {"train/tokens_per_second", "train/steps_per_second", "train/input_wait"}
CPU = (
    # Devices on few busy cores may wait long for one another.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_cpu_collective_timeout_seconds=600"
)


@pytest.fixture(scope="module")
def cached(small, tmp_path_factory):
    """One epoch of the sample corpus, packed."""
    folder = tmp_path_factory.mktemp("cache") / "rows"
    assert main(["cache", *small, f"--output={folder}", "--quiet"]) == 0
    return folder


def start(small, cached, folder, steps, *more, devices=1, **environment) -> subprocess.Popen:
    """`train` in the background; what it says goes to FOLDER.log."""
    command = [sys.executable, "-m", "cosmo", "train", *small, f"--gin.CACHE_PATH={cached}"]
    command += [f"--gin.MODEL_DIR={folder}", f"--gin.TRAIN_STEPS={steps}", "--gin.EVAL_PERIOD=None"]
    command += [
        "--gin.CHECKPOINT_PERIOD=7",
        "--gin.STATS_PERIOD=3",
        "--gin.DROPOUT_RATE=0.1",
        *more,
    ]
    flags = f"{os.environ['XLA_FLAGS']}{CPU} --xla_force_host_platform_device_count={devices}"
    with open(f"{folder}.log", "a") as log:
        return warm_process.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def last_step(folder) -> int:
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def told(folder) -> list[dict]:
    """metrics.jsonl without the rates, which no two runs share."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


def leaves(tree, path=""):
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {k: v for name, x in tree.items() for k, v in leaves(x, f"{path}/{name}").items()}


@pytest.mark.slow
def test_cosmo_train_killed_twenty_times_equals_a_run_left_alone(small, cached, tmp_path):
    """SIGKILL at random steps. Oracle: an uninterrupted run: parameters, optimizer state, position
    in the data and metrics, to the bit."""
    steps, rng = 220, random.Random(4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(small, cached, whole, steps).wait(timeout=600) == 0
    for number in range(20):
        process = start(small, cached, killed, steps)
        goal = last_step(killed) + rng.randint(
            1, max(1, (steps - last_step(killed)) // (22 - number))
        )
        while last_step(killed) < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(small, cached, killed, steps).wait(timeout=600) == 0
    assert told(killed) == told(whole)
    states = [any_format.read_numpy(str(folder)) for folder in (whole, killed)]
    assert states[0][0] == states[1][0] == steps
    one, other = (leaves(state) for _, state in states)
    assert one.keys() == other.keys() and len(one) > 20
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
    positions = [
        (folder / f"checkpoints/{steps}/progress/metadata").read_text()
        for folder in (whole, killed)
    ]
    assert positions[0] == positions[1]


@pytest.mark.slow
def test_cosmo_train_two_processes_train_as_one_does(small, cached, tmp_path):
    """`--distributed`, two processes of one device each, then one process of two devices goes on.

    Oracle: one process with both devices: the same rows, the same losses to float32 rounding.
    """
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert start(small, cached, alone, 21, devices=2).wait(timeout=600) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [
        start(
            small,
            cached,
            shared,
            14,
            "--distributed",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]
    codes = [process.wait(timeout=600) for process in pair]
    assert codes == [0, 0], pathlib.Path(f"{shared}.log").read_text()[-2000:]
    assert start(small, cached, shared, 21, devices=2).wait(timeout=600) == 0
    one, two = told(alone), told(shared)
    by_step = {line["step"]: line for line in two}
    for line in one:
        other = by_step[line["step"]]
        assert other["train/loss"] == pytest.approx(line["train/loss"], rel=1e-4), line["step"]
    positions = [
        json.loads((folder / "checkpoints/21/progress/metadata").read_text())["data"]
        for folder in (alone, shared)
    ]
    assert positions[0] == positions[1]
