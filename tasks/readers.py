"""SODA and ProsocialDialog as their publishers ship them, read into records.

JSON lines, JSON lists (ProsocialDialog's direct download) and Parquet; plain or gzipped; one
file, a folder or a glob; local or remote. See `tasks.files` for how paths and splits are found.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.errors import DataError, shown
from tasks.files import files_for_split, resolve, splits_of
from tasks.records import (
    Place,
    ProsocialDialogue,
    ProsocialTurn,
    SodaDialogue,
    direct_download_turn,
    prosocial_turn,
    row_position,
    soda_dialogue,
)

__all__ = [
    "ProsocialDialogue",
    "ProsocialTurn",
    "SodaDialogue",
    "files_for_split",
    "read_prosocial",
    "read_soda",
    "resolve",
    "splits_of",
]

_log = logging.getLogger(__name__)
_SPACE = re.compile(r"\s*")
_GZIP = b"\x1f\x8b"
_BATCH_ROWS = 1024  # Parquet rows held at a time
_CORRUPT = (EOFError, zlib.error, gzip.BadGzipFile)
_DOWNLOAD_AGAIN = "Download or write the file again."

# Parquet columns that are read; the rest (model answers, reasons of votes) stay on disk.
_SODA_COLUMNS = ("narrative", "dialogue", "speakers")
_PROSOCIAL_COLUMNS = (
    "context",
    "response",
    "rots",
    "safety_label",
    "safety_annotations",
    "dialogue_id",
    "response_id",
    "episode_done",
)


def read_soda(path: Any, split: str = "train") -> Iterator[SodaDialogue]:
    """The SODA dialogues of `split` under `path`, in file order.

    Ids are `soda-SPLIT-N`, N counting dialogues from 0 over the split's files in the order of
    their names. Raises DataError for a missing path and for the first bad record.
    """
    files = files_for_split(path, split)
    count = 0
    for file in files:
        for place, row in _rows(file, _SODA_COLUMNS):
            yield soda_dialogue(row, place, f"soda-{split}-{count}")
            count += 1
    _refuse_empty(files, count)


def read_prosocial(path: Any, split: str = "train") -> Iterator[ProsocialDialogue]:
    """The complete ProsocialDialog dialogues of `split` under `path`, in file order.

    Hub rows are joined to dialogues: a new one starts when `dialogue_id` changes or
    `response_id` does not go on. A dialogue that lacks its first or a middle response is not
    used; a warning per file counts them. Ids are `prosocial-SPLIT-N`, N counting all dialogues
    from 0. Raises DataError for a missing path and for the first bad record.
    """
    files = files_for_split(path, split)
    joiner = _Joiner(f"prosocial-{split}")
    for file in files:
        for place, row in _rows(file, _PROSOCIAL_COLUMNS):
            if isinstance(row, list):
                yield from joiner.finish()
                yield from joiner.whole(_nested_turns(row, place))
            else:
                yield from joiner.add(row, place)
        # Shards cut dialogues: only the next file can tell whether this one's last goes on.
        joiner.report()
    yield from joiner.finish()
    joiner.report()
    _refuse_empty(files, joiner.count)


@dataclass
class _Joiner:
    """Joins consecutive hub rows to dialogues and counts those that cannot be used."""

    prefix: str
    count: int = 0  # dialogues begun, complete or not
    turns: list[ProsocialTurn] = field(default_factory=list)
    dialogue_id: int | None = None
    next_response: int = 0
    complete: bool = True
    ended: bool = True
    file: str = ""
    incomplete: dict[str, int] = field(default_factory=dict)

    def add(self, row: Any, place: Place) -> Iterator[ProsocialDialogue]:
        """Takes one row; yields the dialogue before it when the row starts another."""
        dialogue_id, response_id, done = row_position(row, place)
        # A jump ahead inside a dialogue is a hole in it; a jump back is another dialogue that
        # has the same number, as happens where two samples of the corpus were joined.
        if self.ended or dialogue_id != self.dialogue_id or response_id < self.next_response:
            yield from self.finish()
            self.dialogue_id, self.next_response, self.complete = dialogue_id, 0, True
            self.file = place.file
        self.complete &= response_id == self.next_response
        self.turns.append(prosocial_turn(row, place))
        self.next_response, self.ended = response_id + 1, done

    def whole(self, turns: Sequence[ProsocialTurn]) -> Iterator[ProsocialDialogue]:
        """Takes a dialogue that came in one piece."""
        yield ProsocialDialogue(f"{self.prefix}-{self.count}", tuple(turns))
        self.count += 1

    def finish(self) -> Iterator[ProsocialDialogue]:
        """Yields the dialogue under way, if there is one and it is complete."""
        if self.turns and self.complete:
            yield ProsocialDialogue(f"{self.prefix}-{self.count}", tuple(self.turns))
        elif self.turns:
            self.incomplete[self.file] = self.incomplete.get(self.file, 0) + 1
        self.count += bool(self.turns)
        self.turns, self.ended = [], True

    def report(self) -> None:
        """Warns of the incomplete dialogues counted since the last report."""
        for file, number in self.incomplete.items():
            _log.warning(
                "%s: %d incomplete dialogues are not used (their first or a middle response is "
                "missing)",
                file,
                number,
            )
        self.incomplete = {}


def _nested_turns(rows: list[Any], place: Place) -> list[ProsocialTurn]:
    if not rows:
        raise place.error("a dialogue is empty", "no rows", "at least one")
    return [
        direct_download_turn(row, Place(place.file, place.line, f"{place.inside}, row {number}"))
        for number, row in enumerate(rows, start=1)
    ]


def _refuse_empty(files: Sequence[Any], count: int) -> None:
    if not count:
        raise DataError.at(
            files[0],
            None,
            "the data holds no dialogue",
            got=f"{len(files)} files without a record",
            expected="at least one record",
            remedy=_DOWNLOAD_AGAIN,
        )


def _rows(file: Any, columns: Sequence[str]) -> Iterator[tuple[Place, Any]]:
    """(place, value) of each record of `file`; a nested dialogue comes as a list."""
    if file.name.endswith(".parquet"):
        return _parquet_rows(file, columns)
    return _json_rows(file)


def _json_rows(file: Any) -> Iterator[tuple[Place, Any]]:
    lines = _lines(file)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _json_list(file, number, line + "".join(text for _, text in lines))
            return
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken_json(file, number, line, error) from None
        yield Place(str(file), number), row


def _json_list(file: Any, first_line: int, text: str) -> Iterator[tuple[Place, Any]]:
    """Elements of the JSON list that `text` is, decoded one at a time to know their lines."""
    decoder = json.JSONDecoder()
    line, counted = first_line, 0  # `line` holds text[counted]

    def skip_space(position: int) -> int:
        nonlocal line, counted
        position = _SPACE.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        return position

    def wrong(problem: str, position: int, expected: str) -> DataError:
        got = shown(text[position : position + 40]) if text[position:] else "the end of file"
        at = line + text.count("\n", counted, position)
        return Place(str(file), at).error(problem, got, expected)

    position = skip_space(text.index("[") + 1)
    number = 0
    while text[position : position + 1] != "]":
        if number:
            if text[position : position + 1] != ",":
                raise wrong("broken JSON list", position, "',' or ']'")
            position = skip_space(position + 1)
        number += 1
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise wrong(f"broken JSON ({error.msg})", error.pos, "valid JSON") from None
        yield Place(str(file), line, f"dialogue {number}"), value
        position = skip_space(end)
    if text[skip_space(position + 1) :]:
        raise wrong("text after the JSON list", counted, "the end of file")


def _broken_json(file: Any, number: int, line: str, error: json.JSONDecodeError) -> DataError:
    problem = f"broken JSON ({error.msg} at column {error.colno})"
    return Place(str(file), number).error(problem, shown(line.strip()), "one JSON object a line")


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its newline) of each line of a text file, gunzipped if need be."""
    number = 0
    with file.open("rb") as raw:
        head = raw.read(len(_GZIP))
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if head == _GZIP else raw
        try:
            for number, line in enumerate(stream, start=1):
                # A byte order mark is no part of the first record.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except _CORRUPT as error:
            raise DataError.at(
                file,
                number + 1,
                "the compressed file is cut short or damaged",
                got=str(error),
                expected="a whole gzip file",
                remedy=_DOWNLOAD_AGAIN,
            ) from None
        except UnicodeDecodeError as error:
            raise DataError.at(
                file,
                number,
                "not a text file",
                got=f"byte {error.object[error.start]:#x}",
                expected="JSON in UTF-8",
                remedy=_DOWNLOAD_AGAIN,
            ) from None


def _parquet_rows(file: Any, columns: Sequence[str]) -> Iterator[tuple[Place, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError.at(
            file,
            None,
            "reading Parquet needs pyarrow",
            got="no pyarrow",
            expected="it installed",
            remedy="Install the extra `seqio`, which holds it, or give the data as JSON lines.",
        ) from None
    number = 0
    with file.open("rb") as raw:
        try:
            # A remote file is fetched whole: Parquet seeks, and its shards are small.
            source = raw if hasattr(raw, "fileno") else io.BytesIO(raw.read())
            parquet = pq.ParquetFile(source)
            present = [name for name in columns if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=present):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(file), number, "row of a Parquet file"), row
        except pa.ArrowException as error:
            raise DataError.at(
                file,
                number + 1,
                "the Parquet file is damaged",
                got=shown(str(error)),
                expected="a whole Parquet file",
                remedy=_DOWNLOAD_AGAIN,
            ) from None
