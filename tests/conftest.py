"""Shared by all tests: one compilation cache, so that a second run need not compile again."""

import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "cosmo-jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    """Commands are run from the repository's root, and so are their tests."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real rows and reference numbers beside the repository; skips without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared, which a user's clone does not have")
    return folder
