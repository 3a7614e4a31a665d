"""Faults at every change to files: a kill, a full disk, an error of the device.

Oracle of all: the same command goes on to what an undisturbed run leaves; and a fault that ends a
run is one line, exit code 1.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled shim."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


def faults(shim, folder, work, **options) -> dict:
    command = [sys.executable, "-m", "tests.file_faults.driver", work, str(folder)]
    environment = {**os.environ, "LD_PRELOAD": shim}
    done = subprocess.run(
        [*command, json.dumps(options)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{work}: {found['changes']} changes, {found['points']} faults: {found['outcomes']}")
    return found


@pytest.mark.parametrize(("work", "points"), [("co3", 12), ("infer", 30)])
def test_some_faults(shim, tmp_path, work, points):
    """A sample of what the slow tests do at every place."""
    found = faults(shim, tmp_path, work, points=points)
    assert found["wrong"] == []
    assert found["points"] == points and sum(found["outcomes"]["kill"].values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("work", ["co3", "infer", "cache"])
def test_every_fault(shim, tmp_path, work):
    """Three faults at every change that a run makes to files; the counts are printed."""
    found = faults(shim, tmp_path, work)
    assert found["wrong"] == []
    assert found["points"] == 3 * found["changes"] > 90
    assert sum(sum(counts.values()) for counts in found["outcomes"].values()) == found["points"]


@pytest.mark.slow
def test_faults_of_training(shim, tmp_path):
    """A sample, because a start of a training run takes seconds."""
    found = faults(shim, tmp_path, "train", points=20)
    assert found["wrong"] == []
