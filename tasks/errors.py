"""The one exception that bad data raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cosmo.engine.base.errors import UserError

_LONGEST_VALUE = 120  # characters of a value shown: enough to recognise it in the file


class DataError(UserError, ValueError):
    """Bad data, or a path to data, that the user can put right.

    The text always reads `FILE:LINE: what is wrong: got ..., expected .... What to do.`; a file
    without lines (Parquet) gives the row instead, a missing file gives no line.
    """

    @classmethod
    def at(
        cls,
        file: Any,
        line: int | None,
        problem: str,
        *,
        got: str,
        expected: str,
        remedy: str,
        setting: str | Sequence[str] = (),
    ) -> DataError:
        """The error for `line` (from 1; None when there is no line) of `file`."""
        place = f"{file}:{line}" if line is not None else str(file)
        text = f"{place}: {problem}: got {got}, expected {expected}. {remedy}"
        return cls(text, setting=setting)


def shown(value: Any) -> str:
    """`value` for an error text: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
