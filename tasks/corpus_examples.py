"""The examples of a whole split of a corpus: readers and formatting joined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.formatting import Example, soda_examples
from tasks.prosocial import prosocial_examples
from tasks.readers import read_prosocial, read_soda


def soda_file_examples(path: Any, split: str) -> Iterator[Example]:
    """The examples of a split of SODA, in file order. Raises DataError as `read_soda` does."""
    for dialogue in read_soda(path, split):
        yield from soda_examples(dialogue)


def prosocial_file_examples(path: Any, split: str, seed: int = 0) -> Iterator[Example]:
    """The examples of a split of ProsocialDialog, in file order; `seed` is of the drawn names.

    Raises DataError as `read_prosocial` does.
    """
    for dialogue in read_prosocial(path, split):
        yield from prosocial_examples(dialogue, seed)
