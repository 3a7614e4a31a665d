"""Read the records of a data file: JSON lines and lists, Parquet, Arrow, tables; packed or not.

Each comes with its `Place`, so that an error about it can name file and line.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from cosmo.engine.base import files, json_lines
from cosmo.engine.base.errors import DataError, UserError, shown
from cosmo.tasks.dialogues import Place
from cosmo.tasks.files import split_names

_SPACE = re.compile(r"\s*")
# Errors of pyarrow: OSError for damaged pages, ValueError (its own errors, texts that are not
# UTF-8, dates that Python does not have), NotImplementedError for an unknown encoding.
DAMAGED = (OSError, ValueError, OverflowError, MemoryError, NotImplementedError, LookupError)
COLUMNAR = (files.PARQUET, files.ARROW_FILE, files.ARROW_STREAM)
MAX_ROW_LINES = 1000  # of one quoted field: a lost quote must not take the rest of a file
T = TypeVar("T")
_BATCH_ROWS = 1024  # Parquet rows held at a time, because a row group may be a whole shard


def read_records(file: Any, columns: Sequence[str] | None = None) -> Iterator[tuple[Place, Any]]:
    """Yield (place, value) for each record of a JSON, Parquet or Arrow file.

    `columns` are those to read of Parquet and Arrow (None: all). A nested dialogue comes as a list.
    Raises DataError.
    """
    return _columnar_rows(file, columns) if is_columnar(file) else _json_rows(file)


def is_columnar(file: Any) -> bool:
    """Return whether a file is Parquet or Arrow, by its name or its content."""
    # The name first, because a look at the content of a remote file costs a request.
    if file.name.lower().endswith((".parquet", ".arrow")):
        return True
    with readable(file), files.opened(file, text=False) as stream:
        # The longest of the three marks decides how much is read.
        return stream.read(len(files.ARROW_FILE)).startswith(COLUMNAR)


def read_table(
    file: Any, delimiter: str, columns: Sequence[str] = ()
) -> Iterator[tuple[Place, dict[str, str]]]:
    """Yield (place, {column: text}) for each row of a table with a header line.

    Raises DataError for a row with another number of fields than the header, and for a table
    that lacks one of `columns`.
    """
    header: list[str] = []
    for place, fields in read_separated(file, delimiter):
        if not header:
            header = fields
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


def read_separated(
    file: Any,
    delimiter: str,
    fits: Callable[[list[str], int], bool] = lambda fields, width: len(fields) == width,
    quoted: bool = True,
) -> Iterator[tuple[Place, list[str]]]:
    """Yield (place, fields) for each row of a file of separated fields, the header first.

    A row may be quoted, as csv writers do it, or raw: a quote is then a character of the text.
    `fits(fields, number of the header's fields)` decides which. Where both fit, `quoted` chooses.
    A row that fits neither way comes for the caller to refuse.
    """
    lines = _Pushback(read_lines(file))
    width = 0
    for number, line in lines:
        if not line.strip():
            continue
        place, raw = Place(str(file), number), _raw(line, delimiter)
        # A field with a quote at its start is what a csv writer would have quoted.
        if not any(field.startswith('"') for field in raw):
            yield place, raw
            width = width or len(raw)
            continue
        raw_fits = width > 0 and fits(raw, width)
        if raw_fits and not quoted and not _doubled(raw):
            yield place, raw
            continue
        parsed, used = _csv_row(line, lines, delimiter)
        # Two stray quotes, rows apart, look like one long field. Lines that are rows each are rows.
        if raw_fits and used and all(fits(_raw(one, delimiter), width) for _, one in used):
            parsed = None
        if parsed is None or (raw_fits and not fits(parsed, width)):
            # These lines are rows of their own, and have to be read again.
            lines.push(used)
            parsed = raw
        yield place, parsed
        width = width or len(parsed)


def _raw(line: str, delimiter: str) -> list[str]:
    return line.rstrip("\r\n").split(delimiter)


def _doubled(raw: list[str]) -> bool:
    """Return whether a field is in quotes and each quote in it is doubled, as csv writers do it."""
    inside = [f[1:-1] for f in raw if len(f) > 1 and f[0] == f[-1] == '"']
    return any('""' in text and '"' not in text.replace('""', "") for text in inside)


def _csv_row(
    line: str, following: Iterator[tuple[int, str]], delimiter: str
) -> tuple[list[str] | None, list[tuple[int, str]]]:
    """Return (the fields of a row, the further lines that it took); None if it is no row of csv."""
    used: list[tuple[int, str]] = []

    def texts() -> Iterator[str]:
        yield line
        for number, text in itertools.islice(following, MAX_ROW_LINES):
            used.append((number, text))
            yield text

    try:
        # strict: a quote that is never closed would otherwise take the rest of the file.
        return next(csv.reader(texts(), delimiter=delimiter, strict=True)), used
    except (csv.Error, StopIteration):
        return None, used


class _Pushback(Iterator[T]):
    """An iterator that takes items back."""

    def __init__(self, items: Iterator[T]):
        self._items, self._returned = items, collections.deque[T]()

    def __next__(self) -> T:
        return self._returned.popleft() if self._returned else next(self._items)

    def push(self, items: Sequence[T]) -> None:
        self._returned.extendleft(reversed(items))


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
            # All in memory, because a list may be one line of the whole file.
            yield from _json_list(file, number, line + "".join(text for _, text in numbered))
            return
        place = Place(str(file), number)
        try:
            row = json_lines.value(line)
        except ValueError as error:
            problem = f"broken JSON ({str(error).removeprefix('not JSON: ')})"
            raise place.error(problem, shown(line.strip()), "one JSON object a line") from None
        yield place, row


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
        # Counted from the last element, because counting from the start would take quadratic time.
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
            json_lines.check_depth(value, text[position:end])
        except json.JSONDecodeError as error:
            raise wrong(f"broken JSON ({error.msg})", error.pos, "valid JSON") from None
        except (ValueError, RecursionError) as error:
            problem = f"broken JSON ({json_lines.fault(error)})"
            raise wrong(problem, position, "valid JSON") from None
        yield Place(str(file), line, f"dialogue {number}"), value
        position = skip_space(end)
    # Two lists in one file are a sign of files that were joined.
    if text[skip_space(position + 1) :]:
        raise wrong("text after the JSON list", counted, "the end of file")


def read_entries(file: Any) -> Iterator[tuple[Place, Any]]:
    """Yield (place, value) for each entry of a file that is one JSON object; raise DataError."""
    # All in memory: such a file is a corpus of some megabytes.
    text = "".join(line for _, line in read_lines(file))
    try:
        entries = json_lines.value(text)
    except ValueError as error:
        entries, got = None, str(error)
    else:
        got = shown(entries)
    if not isinstance(entries, dict):
        raise Place(str(file), 1).error("not a JSON object", got, "one object of conversations")
    for name, entry in entries.items():
        yield Place(str(file), 1, f"entry {name}"), entry


def read_lines(file: Any) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text with its newline) of each line of a text file, decompressed.

    Raises DataError for a damaged file, and for one that is not UTF-8.
    """
    number = 0
    with readable(file, lambda: number + 1), files.opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                # A byte order mark is no part of the first record.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError.at(
                    file,
                    number,
                    "not a text file",
                    got=f"byte {error.object[error.start]:#x}",
                    expected="text in UTF-8",
                    remedy=files.DOWNLOAD_AGAIN,
                ) from None
            yield number, text


@contextlib.contextmanager
def readable(file: Any, line: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn an error of the file system, or of a damaged compressed file, into DataError."""
    try:
        yield
    except files.CORRUPT as error:
        # bz2 and zstd raise OSError without a number for damaged data.
        refused = isinstance(error, OSError) and error.errno is not None
        raise DataError.at(
            file,
            None if refused or line is None else line(),
            "the file cannot be read" if refused else "the compressed file is cut short or damaged",
            got=str(getattr(error, "strerror", None) or error),
            expected="a whole file",
            remedy="Correct the path or its permissions." if refused else files.DOWNLOAD_AGAIN,
        ) from None


def _columnar_rows(file: Any, columns: Sequence[str] | None) -> Iterator[tuple[Place, Any]]:
    """Yield the rows of a Parquet file, an Arrow file or an Arrow stream."""
    number, kind = 0, "Arrow" if file.name.lower().endswith(".arrow") else "Parquet"
    with readable(file), files.opened(file, text=False) as stream:
        try:
            blocks = open_columnar(file, stream)
            kind = blocks.kind
            # pyarrow refuses a column that is missing. The reader's own error names the field.
            names = [name for name in blocks.names if columns is None or name in columns]
            for block in range(len(blocks.sizes)):
                for row in blocks.rows(block, names):
                    number += 1
                    yield Place(str(file), number, f"row of a {kind} file"), row
        except DAMAGED as error:
            # A DataError is a ValueError, so DAMAGED would catch it.
            if isinstance(error, UserError):
                raise
            raise DataError.at(
                file,
                number + 1,
                f"the {kind} file is damaged",
                got=shown(str(error)),
                expected=f"a whole {kind} file",
                remedy=files.DOWNLOAD_AGAIN,
            ) from None


@dataclasses.dataclass(frozen=True)
class Columnar:
    """An open Parquet or Arrow file: the names of its columns, and its blocks of rows.

    A block is a row group of Parquet, or a record batch of Arrow. `sizes` are their numbers of
    rows. `batches(block, columns)` yields record batches.
    """

    kind: str
    names: list[str]
    sizes: list[int]
    batches: Callable[[int, list[str]], Iterable[Any]]

    def rows(self, block: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a block; raises one of DAMAGED."""
        for batch in self.batches(block, columns):
            # Arrow trusts its files: offsets out of bounds would read memory that is not ours.
            batch.validate(full=True)
            yield from batch.to_pylist()


def columns_of(file: Any) -> list[str]:
    """Return the names of the columns of a Parquet or Arrow file."""
    with files.opened(file, text=False) as stream:
        return open_columnar(file, stream).names


def open_columnar(file: Any, stream: Any) -> Columnar:
    """Return the blocks of an open Parquet file, Arrow file or Arrow stream.

    Raises DataError without pyarrow, and one of DAMAGED.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError.at(
            file,
            None,
            "reading Parquet and Arrow needs pyarrow",
            got="no pyarrow",
            expected="it installed",
            remedy="Install the extra `seqio`, which holds it, or give the data as JSON lines.",
        ) from None
    head = stream.read(len(files.ARROW_FILE))
    stream.seek(0)
    # A stream without a descriptor (remote, decompressed) is fetched whole, because the formats
    # seek and the shards of corpora are small.
    source = stream if hasattr(stream, "fileno") else io.BytesIO(stream.read())
    if not head.startswith((files.ARROW_FILE, files.ARROW_STREAM)):
        parquet = pq.ParquetFile(source)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        return Columnar(
            "Parquet",
            parquet.schema_arrow.names,
            sizes,
            lambda block, columns: parquet.iter_batches(
                batch_size=_BATCH_ROWS, row_groups=[block], columns=columns
            ),
        )
    if head.startswith(files.ARROW_STREAM):
        reader = pa.ipc.open_stream(source)
        # A stream has no index of its blocks.
        batches = list(reader)
    else:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(block) for block in range(reader.num_record_batches)]
    return Columnar(
        "Arrow",
        list(dict.fromkeys(reader.schema.names)),  # a row holds one of several columns of a name
        [batch.num_rows for batch in batches],
        lambda block, columns: [batches[block].select(columns)],
    )


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
