"""The check that every metric function makes of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def same_length(**lists: Sequence[Any]) -> None:
    """Raise ValueError unless all `lists` have one length, which is not 0."""
    lengths = {name: len(values) for name, values in lists.items()}
    # numpy's mean of nothing is NaN, which looks like a result.
    if 0 in lengths.values():
        raise ValueError(f"nothing to measure: got lengths {lengths}, expected at least 1 example")
    if len(set(lengths.values())) != 1:
        raise ValueError(f"lists that do not match: got lengths {lengths}, expected equal lengths")
