"""What the tests of faults share: runs here and in their own processes, and what they leave."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cosmo.engine.checkpoints import any_format
from cosmo.engine.train import train
from tests import warm_process
from tests.engine import fault_driver

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATES = ("train/tokens_per_second", "train/steps_per_second", "train/input_wait")


def command(model_dir, **options) -> list[str]:
    """The command of a training run; started again, it goes on."""
    return [sys.executable, "-m", "tests.engine.fault_driver", str(model_dir), json.dumps(options)]


def start(model_dir, *, env=None, prefix=(), log=None, **options) -> subprocess.Popen:
    """A run in the background; its output goes to `log`, or MODEL_DIR.log."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment |= env or {}
    with open(log or f"{model_dir}.log", "a") as log:
        begin = subprocess.Popen if prefix else warm_process.Popen
        return begin(
            [*prefix, *command(model_dir, **options)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run(model_dir, *, code=0, **options) -> str:
    """A run to its end; what it said."""
    process = start(model_dir, **options)
    assert process.wait(timeout=240) == code, said(model_dir)
    return said(model_dir)


def run_here(options: dict, model_dir, **changes):
    """A training run in this process; the final state."""
    options = {**fault_driver.OPTIONS, **options, **changes}
    with pytest.MonkeyPatch.context() as patch:
        fault_driver.patch(options, patch.setattr)
        return train.train(**fault_driver.settings(str(model_dir), options))


def said(model_dir) -> str:
    return pathlib.Path(f"{model_dir}.log").read_text()


def last_step(model_dir) -> int:
    """The last step that metrics.jsonl tells of, 0 if there is none."""
    try:
        lines = (pathlib.Path(model_dir) / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def saving(model_dir) -> bool:
    """Whether a checkpoint is being written."""
    return any((pathlib.Path(model_dir) / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def until(process: subprocess.Popen, condition, seconds=120) -> bool:
    """Wait for the condition; False if the process ended before it held."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    process.kill()
    raise AssertionError("waited in vain")


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def metrics(model_dir) -> list[dict]:
    """metrics.jsonl without the rates, which no two runs share."""
    lines = (pathlib.Path(model_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in RATES} for x in lines]


def results(model_dir) -> tuple[dict[str, bytes], dict]:
    """Each array of the final state as bytes; and metrics, progress and bad steps."""
    step, state = any_format.read_numpy(str(model_dir))
    folder = pathlib.Path(model_dir)
    bad = folder / "bad_steps.jsonl"
    told = {
        "step": step,
        "metrics": metrics(model_dir),
        "progress": json.loads((folder / f"checkpoints/{step}/progress/metadata").read_text()),
        "bad": bad.read_text() if bad.exists() else "",
    }
    return {name: array.tobytes() for name, array in leaves(state).items()}, told


def leaves(tree, prefix="") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, x in tree.items() for k, v in leaves(x, f"{prefix}/{name}").items()}
