"""Read numbered records of a file of any size, from any of them on.

A file is read once to count its records and to compute a checksum, and then from where answers are
missing. Memory holds the position of every INDEX_EVERY-th record.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from cosmo.engine.base import files
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets

log = logging.getLogger(__name__)

# Records between the positions that reading can begin at. The positions of all lines of a large
# file would not fit in memory.
INDEX_EVERY = 1024
REJECTED_LOGGED = 10  # the files of a run have them all


class Rejected(NamedTuple):
    """A record that cannot be used: its line (from 1), the reason, and its text."""

    line: int
    reason: str
    record: str


class Span(NamedTuple):
    """Records [start, stop), counted from 0, of output shard `shard`."""

    shard: int
    start: int
    stop: int


class Source(NamedTuple):
    """Numbered records. `read` yields the items of each of some ascending spans.

    An item is a record, or Rejected. A number may have no item or several. `identity` is JSON
    that differs for other records.
    """

    name: str
    count: int
    identity: dict[str, Any]
    read: Callable[[Sequence[Span]], Iterator[list[Any]]]


class Piece(NamedTuple):
    """The lines of one record, and where they start: byte and line, both from 0."""

    start: int
    line: int
    lines: list[bytes]


# A function of an open file, its position and the line there. It yields the pieces from there on;
# a position is always the start of a piece.
Cut = Callable[[BinaryIO, int, int], Iterator[Piece]]


def rows_source(name: str, rows: Sequence[datasets.Row]) -> Source:
    """Return a source of rows that are already in memory."""
    digest = hashlib.sha256()
    for row in rows:
        # A text may hold half a surrogate pair, which plain UTF-8 refuses.
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
        if row.prefix_ids:  # rows without one keep the fingerprint that they had before prefixes
            digest.update(repr(row.prefix_ids).encode())

    def read(spans):
        yield from (list(rows[span.start : span.stop]) for span in spans)

    identity = {"records": len(rows), "sha256": digest.hexdigest()}
    return Source(name, len(rows), identity, read)


def by_line(file: BinaryIO, start: int = 0, line: int = 0) -> Iterator[Piece]:
    """Yield every line as a piece, the first one without a byte order mark."""
    for data in file:
        yield Piece(start, line, [data if start else data.removeprefix(files.MARK)])
        start, line = start + len(data), line + 1


def file_source(
    path: str,
    items: Callable[[Piece, int], Sequence[Any]],
    *,
    expected: str,
    identity: dict[str, Any],
    cut: Cut = by_line,
    survey: Callable[[Piece], None] = lambda piece: None,
) -> Source:
    """Return the records of a file, compressed or not.

    Args:
        path: the file.
        items: function of a piece and its number (from 0) that returns its records. It returns
            Rejected for a record that cannot be used, and nothing for a blank piece.
        expected: the content that the error of an empty file asks for.
        identity: settings that change the records, as JSON values.
        cut: function that cuts the file into pieces.
        survey: called with every piece of the file, in order, before any is read.

    Raises UserError if the file cannot be read or is empty.
    """
    index = _index(path, cut, survey)
    if not index.count:
        raise UserError(f"{path} is empty; give {expected}", setting="input")
    logged = rejects_logger(path)

    def read(spans: Sequence[Span]) -> Iterator[list[Any]]:
        with open_input(path) as file:
            pieces, position = cut(file, 0, 0), 0
            for span in spans:
                # Neighbouring spans need no seek, which in a compressed file reads from the start.
                if span.start != position:
                    start, line = index.positions[span.start // INDEX_EVERY]
                    file.seek(start)
                    pieces = cut(file, start, line)
                    for _ in range(span.start % INDEX_EVERY):
                        next(pieces)
                position = span.stop
                # The range comes first: at its end `zip` must not take a piece of the next span.
                numbered = zip(range(span.start, span.stop), pieces, strict=False)
                yield [item for number, piece in numbered for item in logged(items(piece, number))]

    identity = {"lines": index.count, "sha256": index.sha256, **identity}
    return Source(str(path), index.count, identity, read)


def rejects_logger(path: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that returns items as they are and logs the first rejected ones."""
    rejected = 0

    def logged(items: Sequence[Any]) -> Sequence[Any]:
        nonlocal rejected
        for item in items:
            if isinstance(item, Rejected):
                rejected += 1
                if rejected <= REJECTED_LOGGED:
                    log.warning("rejected: %s:%d: %s", path, item.line, item.reason)
                if rejected == REJECTED_LOGGED:
                    log.warning("further rejected records are written and not logged")
        return items

    return logged


def text_of(lines: Sequence[bytes]) -> str:
    """Return lines as the text of a Rejected, with bytes that are not UTF-8 as escapes."""
    return b"".join(lines).decode("utf-8", errors="backslashreplace").rstrip("\r\n")


class _Index(NamedTuple):
    count: int
    sha256: str  # of the pieces' bytes, decompressed: a recompressed file has the same records
    positions: list[tuple[int, int]]  # byte and line of the start of every INDEX_EVERY-th piece


def _index(path: str, cut: Cut, survey: Callable[[Piece], None]) -> _Index:
    digest, positions, count = hashlib.sha256(), [], 0
    with open_input(path) as file:
        for piece in cut(file, 0, 0):
            if count % INDEX_EVERY == 0:
                positions.append((piece.start, piece.line))
            for line in piece.lines:
                digest.update(line)
            survey(piece)
            count += 1
    return _Index(count, digest.hexdigest(), positions)


@contextlib.contextmanager
def open_input(path: str, *, text: bool = True) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed; see `files.opened` for `text`.

    Raises UserError if it cannot be read.
    """
    try:
        with files.opened(path, text=text) as file:
            yield file
    except files.CORRUPT as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}", setting="input") from error
