"""The wheel: what is in it, and a training run from it in another folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.sizes import TINY

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Return the wheel of `make release`, else one that setuptools builds from a copy."""
    if os.environ.get("WHEEL"):
        return pathlib.Path(os.environ["WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("cosmo", "canary", "data_pipeline", "gin", "tasks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_nobody_gets_a_top_level_package_of_a_common_name(wheel):
    """Oracle: the three packages that the project's page names."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "cosmo",
        "canary",
        "data_pipeline",
    }


def test_the_wheel_carries_all_data(wheel):
    """Oracle: the tracked data files of the packages."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, inside in (("gin", "cosmo/gin"), ("tasks", "cosmo/tasks")):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(ROOT / package)}" in names
    for path in (ROOT / "data_pipeline").rglob("*"):
        if path.suffix in (".toml", ".tsv", ".jsonl"):
            assert str(path.relative_to(ROOT)) in names
    # Without this file a type checker takes every name of ours for Any.
    assert {f"{package}/py.typed" for package in ("cosmo", "canary", "data_pipeline")} <= names
    (scripts,) = [name for name in names if name.endswith("entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(scripts).decode()
    assert all(f"{name} = " in text for name in ("cosmo", "canary", "co3"))


def test_training_runs_from_the_wheel_in_another_folder(wheel, tmp_path):
    """Oracle: a checkpoint of step 3, and no file of the repository among the modules."""
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    code = (
        "import sys; from cosmo.__main__ import main; code = main(sys.argv[1:]); "
        f"assert not [m for m in sys.modules.values() if '{ROOT}/cosmo' in str(m)]; sys.exit(code)"
    )
    arguments = ["train", "--gin_file=gin/cosmo/tiny.gin", "--gin.MODEL_DIR=run", *TINY]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--gin.TRAIN_STEPS=3", "--gin.EVAL_PERIOD=None"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "run/checkpoints/3").is_dir()
