"""Faults at every change to files: a kill, a full disk, an error of the device, a power loss.

Oracle of all: the same command goes on to what an undisturbed run leaves; and a fault that ends a
run is one line, exit code 1.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

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


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: an fsync costs nothing there."""
    memory = pathlib.Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield pathlib.Path(made)


def faults(shim, folder, work, **options) -> dict:
    command = [sys.executable, "-m", "tests.file_faults.driver", work, str(folder)]
    environment = {**os.environ, "LD_PRELOAD": shim}
    done = subprocess.run(
        [*command, json.dumps(options)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{work}: {found['changes']} changes, {found['points']} faults")
    for kind, counts in found["outcomes"].items():
        print(f"  {kind}: {counts}, {found['seconds'][kind]} s")
    print(f"  {found['states']} different states after power losses")
    return found


@pytest.mark.parametrize(("work", "points"), [("co3", 4), ("infer", 10)])
def test_some_faults(shim, folder, work, points):
    """A sample of what the slow tests do at every place; a power loss also comes at the end."""
    found = faults(shim, folder, work, points=points)
    assert found["wrong"] == []
    assert 5 * points <= found["points"] <= 5 * points + 2
    assert sum(found["outcomes"]["kill"].values()) == points


@pytest.mark.slow
@pytest.mark.parametrize("work", ["co3", "infer", "cache"])
def test_every_fault(shim, folder, work):
    """Three faults and two power losses at every change of files; the counts are printed."""
    found = faults(shim, folder, work)
    assert found["wrong"] == []
    assert found["points"] == 5 * found["changes"] + 2 > 150
    assert sum(sum(counts.values()) for counts in found["outcomes"].values()) == found["points"]


@pytest.mark.slow
def test_faults_of_training(shim, folder):
    """A sample, because a start of a training run takes seconds."""
    found = faults(shim, folder, "train", points=7)
    assert found["wrong"] == []
