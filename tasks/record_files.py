"""Read the records of one data file: JSON lines, JSON lists, Parquet, tables; compressed or not.

Each comes with its `Place`, so that an error about it can name file and line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cosmo.engine.base import files
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import split_names

DOWNLOAD_AGAIN = "Download or write the file again."

_SPACE = re.compile(r"\s*")
_BATCH_ROWS = 1024  # Parquet rows held at a time, because a row group may be a whole shard


def read_records(file: Any, columns: Sequence[str] | None = None) -> Iterator[tuple[Place, Any]]:
    """Yield (place, value) for each record of a JSON or Parquet file.

    `columns` are those to read of Parquet (None: all). A nested dialogue comes as a list. Raises
    DataError.
    """
    if file.name.endswith(".parquet"):
        return _parquet_rows(file, columns)
    return _json_rows(file)


def read_table(
    file: Any, delimiter: str, columns: Sequence[str] = ()
) -> Iterator[tuple[Place, dict[str, str]]]:
    """Yield (place, {column: text}) for each row of a table with a header line.

    Raises DataError for a row with another number of fields than the header, and for a table
    that lacks one of `columns`.
    """
    reader = csv.reader((line for _, line in read_lines(file)), delimiter=delimiter)
    header: list[str] = []
    first = 1  # the line that the next row begins on: line_num is where the last one ended
    try:
        for fields in reader:
            place, first = Place(str(file), first), reader.line_num + 1
            if not header or not fields:
                header = header or fields
                continue
            if len(fields) != len(header):
                wrong = f"{len(fields)} fields, the first {shown(fields[0])}"
                raise place.error(
                    "a row of another length than the header", wrong, f"{len(header)} fields"
                )
            row = dict(zip(header, fields, strict=True))
            for name in columns:
                if name not in row:
                    raise missing_column(name, row, place)
            yield place, row
    except csv.Error as error:
        raise Place(str(file), first).error("not a table", str(error), "rows of fields") from None


def missing_column(name: str, row: Mapping[str, str], place: Place) -> DataError:
    """Return the error for a row without the column `name`."""
    return place.error(f"column '{name}' is missing", f"the columns {list(row)}", "it")


def _json_rows(file: Any) -> Iterator[tuple[Place, Any]]:
    numbered = read_lines(file)
    for number, line in numbered:
        if not line.strip():
            continue
        # The content decides, because a .json file may hold a list (ProsocialDialog's direct
        # download) or lines (its hub files).
        if line.lstrip().startswith("["):
            yield from _json_list(file, number, line + "".join(text for _, text in numbered))
            return
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"broken JSON ({error.msg} at column {error.colno})"
            raise Place(str(file), number).error(
                problem, shown(line.strip()), "one JSON object a line"
            ) from None
        yield Place(str(file), number), row


def _json_list(file: Any, first_line: int, text: str) -> Iterator[tuple[Place, Any]]:
    """Yield the elements of the JSON list that `text` is."""
    # One element at a time, because json.loads of the whole would lose their lines.
    decoder = json.JSONDecoder()
    line, counted = first_line, 0  # text[counted] is on `line`

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


def read_lines(file: Any) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text with its newline) of each line of a text file, decompressed.

    Raises DataError for a damaged file, and for one that is not UTF-8.
    """
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


def _parquet_rows(file: Any, columns: Sequence[str] | None) -> Iterator[tuple[Place, Any]]:
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
            # A remote file is fetched whole, because Parquet seeks and its shards are small.
            source = raw if hasattr(raw, "fileno") else io.BytesIO(raw.read())
            parquet = pq.ParquetFile(source)
            names = parquet.schema_arrow.names
            present = [name for name in names if columns is None or name in columns]
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


def refuse_empty(path: Any, split: str, count: int) -> None:
    """Raise DataError if `path` held no record of `split`."""
    if not count:
        raise DataError.at(
            path,
            None,
            f"the data holds no record of split {split!r}",
            got="0 records",
            expected=f"at least one of the split {' or '.join(split_names(split))}",
            remedy="Correct the path, or download the file again.",
        )
