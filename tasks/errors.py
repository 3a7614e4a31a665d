"""The one exception that bad data raises."""

from __future__ import annotations

from typing import Any

_LONGEST_VALUE = 120  # characters of a value shown: enough to recognise it in the file


class DataError(ValueError):
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
    ) -> DataError:
        """The error for `line` (from 1; None when there is no line) of `file`."""
        place = f"{file}:{line}" if line is not None else str(file)
        return cls(f"{place}: {problem}: got {got}, expected {expected}. {remedy}")


def shown(value: Any) -> str:
    """`value` for an error text: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
