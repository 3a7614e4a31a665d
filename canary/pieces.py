"""Cut files into dialogues without reading them whole: elements of a JSON list, neighbouring rows.

Each function is a `cosmo.engine.infer.record_sources.Cut`. A streaming JSON parser would not do: a
run resumes at a piece's byte offset. Nor may a damaged element end the rest of the list.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer.record_sources import Piece, by_line
from cosmo.tasks import readers

# Not larger, because `drop` copies the rest of the data for every element.
CHUNK_BYTES = 1 << 16  # of a JSON list read at a time
MAX_ELEMENT_BYTES = 64 << 20  # a file that is not a list would be one element, and be read whole
# A string, or a bracket. The group is the string's closing quote, or the end of the data so far.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*("|\\?\Z)|[\[\]{}]', re.DOTALL)
_BETWEEN = re.compile(rb"[\s,]*")
_SPACE = re.compile(rb"\s*")
_SCALAR = re.compile(rb"[^,\]\s]*")


def elements(file: BinaryIO, start: int = 0, line: int = 0) -> Iterator[Piece]:
    """Yield the elements of a JSON list as bytes; one that breaks off is the rest of the file.

    Lists may follow each other, as in files that were joined. Anything else after a list is
    elements too: the reader finds out whether they are valid JSON. Raises UserError for an element
    longer than MAX_ELEMENT_BYTES.
    """
    window = _Window(file, start, line)
    if start == 0:
        # A byte order mark and blank lines may stand before the list.
        window.drop(window.find(b"[") + 1)
    while True:
        while (skip := _BETWEEN.match(window.data).end()) == len(window.data) and window.more():
            pass
        window.drop(skip)
        if not window.data:
            return
        if window.data.startswith(b"]"):  # the list's end: another may follow, of files joined
            window.drop(1)
            while (skip := _SPACE.match(window.data).end()) == len(window.data) and window.more():
                pass
            window.drop(skip + window.data.startswith(b"[", skip))
            continue
        size = _element(window)
        yield Piece(window.start, window.line, [window.data[:size]])
        window.drop(size)


class _Window:
    """The part of a file in memory: `data` begins at byte `start`, in line `line`."""

    def __init__(self, file: BinaryIO, start: int, line: int):
        self.file, self.start, self.line, self.data = file, start, line, b""
        self.more()

    def more(self) -> bool:
        """Append the next chunk; return whether there was one."""
        chunk = self.file.read(CHUNK_BYTES)
        self.data += chunk
        return bool(chunk)

    def drop(self, size: int) -> None:
        self.line += self.data.count(b"\n", 0, size)
        self.start += size
        self.data = self.data[size:]

    def find(self, byte: bytes) -> int:
        while (place := self.data.find(byte)) < 0 and self.more():
            pass
        return place if place >= 0 else len(self.data) - 1


def _element(window: _Window) -> int:
    """Return the size of the element that the window begins with, once all of it is read."""
    place = depth = 0
    if window.data[:1] not in (b"[", b"{", b'"'):  # no dialogue; the reader rejects it
        while (end := _SCALAR.match(window.data).end()) == len(window.data) and window.more():
            pass
        # Not 0, or the cutter would stay at one byte for ever.
        return max(end, 1)
    while True:
        token = _TOKEN.search(window.data, place)
        # Brackets in a string do not count, so a string must be whole before the next token.
        if token is None or token[1] not in (None, b'"'):
            place = token.start() if token else len(window.data)
            if len(window.data) > MAX_ELEMENT_BYTES:
                raise UserError(
                    f"line {window.line + 1} begins an element of more than "
                    f"{MAX_ELEMENT_BYTES >> 20} MiB: no list of dialogues, or one that lacks a "
                    "bracket"
                )
            if not window.more():
                return len(window.data)
            continue
        # Any closing bracket closes: a wrong pair is found by the JSON parser.
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        place = token.end()
        if depth <= 0:
            return place


def dialogues(file: BinaryIO, start: int = 0, line: int = 0) -> Iterator[Piece]:
    """Yield ProsocialDialog's hub rows, those of a dialogue together.

    A line that is not a row stands alone. A blank line belongs to the row before it.
    """

    def rows() -> Iterator[Piece]:
        row: Piece | None = None
        for piece in by_line(file, start, line):
            # A blank line stays with a row, so that a piece begins where the last one ends.
            if row is not None and not piece.lines[0].strip():
                row.lines.extend(piece.lines)
                continue
            if row is not None:
                yield row
            row = piece
        if row is not None:
            yield row

    for group in readers.group_by_dialogue(rows(), lambda row: _position(row.lines[0])):
        yield group[0]._replace(lines=[data for row in group for data in row.lines])


def _position(data: bytes) -> readers.Position | None:
    """Return the place of a row in its dialogue, None for a line that has none.

    This is laxer than `readers.row_position`, because a row is checked when its dialogue is read.
    """
    try:
        row = json_lines.value(data)
        done = bool(row.get("episode_done"))
        return readers.Position(row["dialogue_id"], int(row["response_id"]), done)
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError):
        return None
