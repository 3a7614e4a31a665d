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

from tests.file_faults import power

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


# A program, and the state that each variant of a power loss after its end leaves. By hand.
PROGRAMS = {
    "write": ("open('a', 'w').write('x')", {"a": b""}, {}),
    "fsync": ("f = open('a', 'w'); f.write('x'); f.flush(); os.fsync(f.fileno())", {"a": b"x"}, {}),
    "rename": (
        "keep('a', 'x'); open('b', 'w').write('y'); os.rename('b', 'a')",
        {"a": b""},
        {"a": b"x"},
    ),
    "both": ("keep('a', 'x'); keep('b', 'y'); os.rename('b', 'a'); folder('.')", {"a": b"y"}, None),
    "shorter": (
        "keep('a', 'xyz'); f = open('a', 'r+'); f.truncate(1)",
        {"a": b"x"},
        {"a": b"xyz"},
    ),
    "gone": ("keep('a', 'x'); os.unlink('a')", {}, {"a": b"x"}),
    "inside": ("os.mkdir('d'); keep('d/a', 'x')", {"d": None, "d/a": b"x"}, {}),
    "moved": (
        "os.mkdir('d'); folder('.'); keep('a', 'x'); os.rename('a', 'd/b'); folder('d')",
        {"d": None, "d/b": b"x"},
        None,
    ),
}
HELPERS = """
import os, sys
def folder(path):
    number = os.open(path, os.O_RDONLY); os.fsync(number); os.close(number)
def keep(path, text):
    with open(path, 'w') as file:
        file.write(text); file.flush(); os.fsync(file.fileno())
    folder(os.path.dirname(path) or '.')
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_power_loss_leaves(shim, tmp_path, name):
    """Oracle: the model of `power.py`, applied by hand. None stands for the first variant's."""
    code, named, unnamed = PROGRAMS[name]
    root, trace, counter = (tmp_path / name for name in ("root", "trace", "counter"))
    root.mkdir()
    trace.mkdir()
    counter.write_bytes(bytes(8))
    given = {"ROOT": root, "TRACE": trace, "COUNTER": counter, "MODE": "record", "AT": 0}
    environment = {f"FILE_FAULTS_{key}": str(value) for key, value in given.items()}
    command = [sys.executable, "-c", HELPERS + code]
    subprocess.run(command, cwd=root, env={**environment, "LD_PRELOAD": shim}, check=True)
    disk = power.Disk(root, trace)
    disk.forward(1000)
    assert disk.state("named") == named
    assert disk.state("unnamed") == (named if unnamed is None else unnamed)


@pytest.mark.parametrize(
    ("work", "points"),
    [("co3", 4), ("infer", 4), pytest.param("infer", 10, marks=pytest.mark.slow)],
)
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
