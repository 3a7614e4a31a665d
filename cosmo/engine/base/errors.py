"""Define the errors that the user can fix. The message gives the value, the rule and the remedy."""

from collections.abc import Sequence
from typing import Any

MAX_SHOWN_CHARS = 120  # of a value in an error: enough to recognise it in the file
MAX_GOT_CHARS = 600  # of all that is wrong in an error


class UserError(Exception):
    """Bad input, configuration or environment. A command line prints it as one line, exit code 1.

    `setting` names what the user has to change: a macro ("CHECKPOINT_PATH"), a parameter
    ("t5.T5Config.emb_dim") or a flag without its dashes ("window"). The command
    line spells the setting, not the code that raises the error: see `command_line.spelled`.
    """

    def __init__(self, message: object = "", *, setting: str | Sequence[str] = ()):
        super().__init__(message)
        # Attributes of the instance: gin raises a proxy of an error, made without this method, that
        # looks up in the original what it lacks itself.
        self.message = str(message)
        self.settings = (setting,) if isinstance(setting, str) else tuple(setting)

    def __str__(self) -> str:
        """Return the message with the bare settings, for Python, T5X and TensorFlow's reports."""
        names = f" (setting: {', '.join(self.settings)})" if self.settings else ""
        return f"{self.message}{names}"


class QueueFull(Exception):  # noqa: N818, its name is that of `queue.Full` and asyncio's
    """A bounded queue of requests has no room. A caller may try again later."""


class DataError(UserError, ValueError):
    """Bad data, or a path to data, that the user can correct.

    The text always reads `FILE:LINE: problem: got ..., expected .... Remedy.` A file without lines
    (Parquet) gives the row instead, and a missing file gives no line.
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
    ) -> "DataError":
        """Return the error for a line (from 1; None if there is none) of a file."""
        got = shortened(got, MAX_GOT_CHARS)  # it may list names of 5,000 characters each
        place = f"{file}:{line}" if line is not None else str(file)
        text = f"{place}: {problem}: got {got}, expected {expected}. {remedy}"
        return cls(text, setting=setting)


def shown(value: Any) -> str:
    """Return the repr of a value, shortened and on one line, for an error's text."""
    try:
        text = repr(value).replace("\n", " ")  # that of an array has several lines
    except (RecursionError, ValueError):  # nested too deeply, or a number of 5,000 digits
        text = f"a {type(value).__name__} too large to show"
    return shortened(text)


def shortened(text: str, limit: int = MAX_SHOWN_CHARS) -> str:
    """Return a text, cut to `limit` characters, for an error's text."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
