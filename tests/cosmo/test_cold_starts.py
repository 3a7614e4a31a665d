"""First starts of training: nothing compiled before, and other processes busy."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests.sizes import TINY

ROOT = pathlib.Path(__file__).resolve().parents[2]
STARTS = 30
BUSY_PROCESSES = 4


def train(model_dir: pathlib.Path, cache: pathlib.Path, *more: str) -> subprocess.CompletedProcess:
    """Run `python -m cosmo train` for two steps with the compilation cache `cache`."""
    command = [sys.executable, "-m", "cosmo", "train", "--gin_file=gin/cosmo/tiny.gin", *TINY]
    command += [f"--gin.MODEL_DIR={model_dir}", "--gin.TRAIN_STEPS=2", "--gin.EVAL_PERIOD=2"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.run(
        [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_every_cold_start_beside_busy_processes_trains(tmp_path):
    """Property: STARTS first starts, each with an empty compilation cache, all end well.

    In the version whose reading thread imported SeqIO, 2 of about 45 starts died of
    "No module named 'jax._src...'".
    """
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY_PROCESSES)
    ]
    try:
        for number in range(STARTS):
            done = train(tmp_path / f"run{number}", tmp_path / f"cache{number}")
            assert done.returncode == 0, f"start {number}: {done.stderr[-3000:]}"
            assert "Traceback" not in done.stderr, done.stderr
    finally:
        for process in busy:
            process.kill()


# Imports take 3 s longer inside etils' lazy_imports, which replaces builtins.__import__, wherever a
# thread other than the main one uses it.
SLOW_LAZY_IMPORTS = """
import contextlib, sys, threading, time
from etils import epy
from etils.epy import lazy_imports_utils

real = lazy_imports_utils.lazy_imports

@contextlib.contextmanager
def slow(*args, **kwargs):
    with real(*args, **kwargs):
        yield
        if threading.current_thread() is not threading.main_thread():
            time.sleep(3)

lazy_imports_utils.lazy_imports = epy.lazy_imports = slow
from cosmo import __main__

if __name__ == "__main__":
    sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_thread_imports_while_jax_traces(tmp_path):
    """Oracle: exit code 0 where a thread that imported SeqIO or Grain would break JAX for sure."""
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW_LAZY_IMPORTS))
    arguments = ["train", "--gin_file=gin/cosmo/tiny.gin", *TINY, "--gin.TRAIN_STEPS=2"]
    arguments += [f"--gin.MODEL_DIR={tmp_path}/run", "--gin.EVAL_PERIOD=None"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
