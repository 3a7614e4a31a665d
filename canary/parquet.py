"""SODA as it ships, in Parquet: numbered rows, read in batches from any of them on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import record_sources
from cosmo.tasks.dialogues import Place

COLUMNS = ("narrative", "dialogue", "speakers")
BATCH = 1024  # rows held at a time


def source(path: str, read: Callable[[Any, Place, int], Any]) -> record_sources.Source:
    """The rows of a Parquet file of SODA, for `bulk.answer_source`; `read` makes an item of each.

    Raises UserError for a file that is no Parquet, has no rows or is of another corpus.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"--input={path}: reading Parquet needs pyarrow; install it (it is in the extra "
            "`seqio`), or give JSON lines"
        ) from None
    try:
        with record_sources.open_input(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found = pq.ParquetFile(file)
            names = set(found.schema_arrow.names)
            sizes = [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]
    except pa.ArrowException as error:
        raise UserError(f"--input={path} is no whole Parquet file: {error}") from error
    if not set(COLUMNS) <= names:
        raise UserError(
            f"--input={path} has the columns {sorted(names)}; of Parquet files those of SODA are "
            f"read ({', '.join(COLUMNS)}): give other corpora as JSON lines"
        )
    if not sum(sizes):
        raise UserError(f"--input={path} is empty")

    def rows(file: Any, start: int) -> Iterator[Any]:
        group = passed = 0
        while passed + sizes[group] <= start:
            passed += sizes[group]
            group += 1
        batches = pq.ParquetFile(file).iter_batches(
            batch_size=BATCH, row_groups=range(group, len(sizes)), columns=list(COLUMNS)
        )
        number = passed
        for batch in batches:
            if number + batch.num_rows > start:
                yield from batch.slice(max(0, start - number)).to_pylist()
            number += batch.num_rows

    logged = record_sources.rejects_logger(path)

    def items(spans: Sequence[record_sources.Span]) -> Iterator[list[Any]]:
        with record_sources.open_input(path) as file:
            position, following = -1, iter(())
            for span in spans:
                if span.start != position:
                    following = rows(file, span.start)
                position = span.stop
                numbered = zip(range(span.start, span.stop), following, strict=False)
                found = [read(row, Place(path, number + 1), number) for number, row in numbered]
                yield list(logged(found))

    return record_sources.Source(path, sum(sizes), {"rows": sum(sizes), "sha256": digest}, items)


def kept(row: Any) -> list[bytes]:
    """A row as a reject keeps it."""
    return [json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")]
