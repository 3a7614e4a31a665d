"""Fixtures of the task tests: small files written on the spot, and the shared real data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks.tasks_samples import train_vocabulary

_SHARED = Path(__file__).resolve().parents[2] / "../shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real rows and reference numbers beside the repository, or a skip."""
    if not _SHARED.exists():
        pytest.skip("no folder ../shared beside the repository")
    return _SHARED.resolve()


@pytest.fixture(scope="session")
def t5_vocabulary(shared) -> Path:
    """T5's published SentencePiece model."""
    return shared / "data/t5_cc_all.32000.100extra.model"


@pytest.fixture(scope="session")
def vocabulary_path(tmp_path_factory) -> Path:
    """A tiny vocabulary in which both separators are pieces of their own."""
    prefix = tmp_path_factory.mktemp("vocabulary") / "sample"
    return train_vocabulary(prefix, user_defined_symbols=["<sep>", "<turn>"])
