"""Write and read JSON lines: no text is unwritable, and every fault is a ValueError with words."""

import json
from collections.abc import Iterable
from typing import Any

# Far below Python's limit of about 1,000, because later stages walk, print and write the value from
# deeper in their own stacks. No corpus known here nests deeper than 6.
MAX_DEPTH = 100
_TOO_DEEP = f"nested too deeply (more than {MAX_DEPTH} levels)"


def encode(text: str) -> bytes:
    r"""Return `text` as UTF-8, with half a surrogate pair as the escape `\ud800`.

    Plain UTF-8 refuses such a half. In JSON the escape stands for the same text.
    """
    return text.encode("utf-8", "backslashreplace")


def is_whole(text: str) -> bool:
    """Return whether a text holds no half of a surrogate pair, so that a vocabulary can read it."""
    if text.isascii():  # nearly always, and much faster
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def line(value: Any) -> bytes:
    """Return a JSON value as one line of UTF-8, with its newline."""
    return encode(json.dumps(value, ensure_ascii=False)) + b"\n"


def lines(values: Iterable[Any]) -> bytes:
    """Return JSON values as the content of a file, one a line."""
    return b"".join(map(line, values))


def value(data: bytes | str) -> Any:
    """Return the JSON value of a line or of a whole file; ValueError that names the fault.

    A byte order mark at the start is no part of it.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {data[error.start]:#x})") from error
    try:
        found = json.loads(text)
        check_depth(found, text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {fault(error)}") from error
    return found


def fault(error: Exception) -> str:
    """Return in words why parsing JSON, or `check_depth`, failed."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    # Python's own limit on int(text): its message is for programmers.
    digits = "Exceeds the limit" in str(error)
    return "a whole number of more than 4,300 digits" if digits else str(error)


def check_depth(found: Any, text: str) -> None:
    """Raise ValueError if a value, read from `text`, is nested deeper than MAX_DEPTH."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:  # nearly always
        return
    level, depth = [found], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        level = [one for x in level for one in (x.values() if isinstance(x, dict) else x)]
