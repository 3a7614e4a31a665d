"""Read numbered records of a file of any size: JSON lines, or other pieces.

A file is read once to count its pieces and to fingerprint them, and then from any of them on.
Memory holds one place of every INDEX_EVERY pieces.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from cosmo.engine.base import files
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import shards

log = logging.getLogger(__name__)

INDEX_EVERY = 1024  # pieces between the places that reading can begin at
WARNINGS = 10  # rejected pieces that are also logged


class Piece(NamedTuple):
    """The lines of one record, and where they start: byte and line, both from 0."""

    start: int
    line: int
    lines: list[bytes]


# An open file, with its position and its line there, to its pieces from there on. A position is
# always where a piece starts.
Cut = Callable[[BinaryIO, int, int], Iterator[Piece]]


def by_line(file: BinaryIO, start: int = 0, line: int = 0) -> Iterator[Piece]:
    """Yield every line as a piece, the first one without a byte order mark."""
    for data in file:
        yield Piece(start, line, [data if start else data.removeprefix(files.MARK)])
        start, line = start + len(data), line + 1


def source(
    path: str,
    items: Callable[[Piece, int], Sequence[Any]],
    *,
    expected: str,
    identity: dict[str, Any],
    cut: Cut = by_line,
    survey: Callable[[Piece], None] = lambda piece: None,
) -> shards.Source:
    """Return the records that `items` makes of each piece of a file, compressed or not.

    `items(piece, its number from 0)` returns what cannot be used as `shards.Rejected`, which is
    logged, and nothing for a blank piece. `identity` is what else tells these records from others.
    `survey` is called with every piece of the file, in order, before any is read. Raises UserError,
    which names what is `expected`, if the file cannot be read or is empty.
    """
    index = _index(path, cut, survey)
    if not index.count:
        raise UserError(f"{path} is empty; give {expected}", setting="input")
    logged = logging_rejects(path)

    def read(spans: Sequence[shards.Span]) -> Iterator[list[Any]]:
        with opened(path) as file:
            pieces, position = cut(file, 0, 0), 0
            for span in spans:
                if span.start != position:
                    start, line = index.places[span.start // INDEX_EVERY]
                    file.seek(start)
                    pieces = cut(file, start, line)
                    for _ in range(span.start % INDEX_EVERY):
                        next(pieces)
                position = span.stop
                numbered = zip(range(span.start, span.stop), pieces, strict=False)
                yield [item for number, piece in numbered for item in logged(items(piece, number))]

    return shards.Source(
        str(path), index.count, {"lines": index.count, "sha256": index.sha256, **identity}, read
    )


def logging_rejects(path: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that passes items on and logs the first few that are rejected."""
    warned = 0

    def logged(items: Sequence[Any]) -> Sequence[Any]:
        nonlocal warned
        for item in items:
            if isinstance(item, shards.Rejected):
                warned += 1
                if warned <= WARNINGS:
                    log.warning("rejected: %s:%d: %s", path, item.line, item.reason)
                if warned == WARNINGS:
                    log.warning("further rejected records are written and not logged")
        return items

    return logged


def text_of(lines: Sequence[bytes]) -> str:
    """Return lines as a reject keeps them, with the bytes that are no UTF-8 spelt out."""
    return b"".join(lines).decode("utf-8", errors="backslashreplace").rstrip("\r\n")


class _Index(NamedTuple):
    count: int
    sha256: str  # of the pieces' bytes, decompressed
    places: list[tuple[int, int]]  # byte and line where every INDEX_EVERYth piece starts


def _index(path: str, cut: Cut, survey: Callable[[Piece], None]) -> _Index:
    digest, places, count = hashlib.sha256(), [], 0
    with opened(path) as file:
        for piece in cut(file, 0, 0):
            if count % INDEX_EVERY == 0:
                places.append((piece.start, piece.line))
            for line in piece.lines:
                digest.update(line)
            survey(piece)
            count += 1
    return _Index(count, digest.hexdigest(), places)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file, decompressed if need be; UserError if it cannot be read."""
    try:
        with files.opened(path) as file:
            yield file
    except files.CORRUPT as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}", setting="input") from error
