"""The records of one data file: JSON lines, JSON lists, Parquet, tables; compressed or not.

Each comes with its `Place`, so that whoever checks it can name file and line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cosmo.engine.base import files
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.dialogues import Place

DOWNLOAD_AGAIN = "Download or write the file again."

_SPACE = re.compile(r"\s*")
_BATCH_ROWS = 1024  # Parquet rows held at a time


def rows(file: Any, columns: Sequence[str]) -> Iterator[tuple[Place, Any]]:
    """(place, value) of each record of `file`; a nested dialogue comes as a list."""
    if file.name.endswith(".parquet"):
        return _parquet_rows(file, columns)
    return _json_rows(file)


def table(file: Any, delimiter: str) -> Iterator[tuple[Place, dict[str, str]]]:
    """(place, row as column -> text) of a table with a header line; quoted as the csv module reads.

    Raises DataError for a row with another number of fields than the header.
    """
    last = 0  # lines handed to the csv module so far

    def texts() -> Iterator[str]:
        nonlocal last
        for number, line in lines(file):
            last = number
            yield line

    reader = csv.reader(texts(), delimiter=delimiter)
    header: list[str] = []
    first = 1  # the line that the next row begins on: a quoted field may hold line breaks
    try:
        for fields in reader:
            place, first = Place(str(file), first), last + 1
            if not header:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    wrong = f"{len(fields)} fields, the first {shown(fields[0])}"
                    raise place.error(
                        "a row of another length than the header", wrong, f"{len(header)} fields"
                    )
                yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise Place(str(file), first).error("not a table", str(error), "rows of fields") from None


def _json_rows(file: Any) -> Iterator[tuple[Place, Any]]:
    numbered = lines(file)
    for number, line in numbered:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _json_list(file, number, line + "".join(text for _, text in numbered))
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


def lines(file: Any) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text with its newline) of each line of a text file, decompressed."""
    number = 0
    with files.opened(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                # A byte order mark is no part of the first record.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except files.CORRUPT as error:
            raise DataError.at(
                file,
                number + 1,
                "the compressed file is cut short or damaged",
                got=str(error),
                expected="a whole file",
                remedy=DOWNLOAD_AGAIN,
            ) from None
        except UnicodeDecodeError as error:
            raise DataError.at(
                file,
                number,
                "not a text file",
                got=f"byte {error.object[error.start]:#x}",
                expected="text in UTF-8",
                remedy=DOWNLOAD_AGAIN,
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
                remedy=DOWNLOAD_AGAIN,
            ) from None


def refuse_empty(files: Sequence[Any], count: int) -> None:
    """Raises DataError if `files` held no record."""
    if not count:
        raise DataError.at(
            files[0],
            None,
            "the data holds no dialogue",
            got=f"{len(files)} files without a record",
            expected="at least one record",
            remedy=DOWNLOAD_AGAIN,
        )
