"""Servers over tiny models, each a process of its own, for clients in an environment of theirs."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from tests.canary.conftest import run as canary_run  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_SECONDS = 180.0


@pytest.fixture(scope="session")
def client_python() -> str:
    """Return the interpreter of the clients' environment, or skip."""
    python = pathlib.Path(os.environ.get("CLIENTS", ROOT / ".venv-clients")) / "bin" / "python"
    if not python.exists():
        pytest.skip("needs .venv-clients: make test-clients installs it")
    return str(python)


@contextlib.contextmanager
def serving(*command: str, log: pathlib.Path, python: str = sys.executable):
    """Run `python -m COMMAND`; yield the address that it prints. SIGTERM ends it, with code 0."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [python, "-m", *command], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT
        )
        try:
            yield _address(process, log)
            process.terminate()
            assert process.wait(60) == 0, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen, log: pathlib.Path) -> str:
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS:
        found = re.search(r"listening on (http://[^\s/]+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no address after {START_SECONDS} s: {log.read_text()[-3000:]}")
