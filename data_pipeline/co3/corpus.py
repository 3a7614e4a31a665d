"""The triples of a file as work for a run, and what is written of their records."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cosmo.engine.base.errors import UserError
from data_pipeline.calls.outputs import Result
from data_pipeline.calls.requests import Rejected, Stage
from data_pipeline.calls.run import Work, rejected_line
from data_pipeline.co3 import distil, postprocess, schema, triples
from data_pipeline.co3.schema import Record
from data_pipeline.co3.triples import Triple

LISTS = ("words.toml", "names.tsv")  # data of this package that outputs depend on


@dataclasses.dataclass(frozen=True)
class Source:
    """Which triples: of a file, what the critic keeps, a sample in SODA's ratios, a shard."""

    path: Path
    critic: str | None = None
    sample: int | None = None
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What tells this source from others, but for its limit. Raises UserError."""
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                head = file.read(1 << 20)
                file.seek(max(0, size - (1 << 20)))
                digest = hashlib.sha256(head + file.read()).hexdigest()[:16]
        except OSError as error:
            raise UserError(f"--triples={self.path}: {error.strerror}") from error
        index, count = self.shard
        return {
            "triples": f"{self.path.name} ({size} bytes, {digest})",
            "critic": self.critic,
            "sample": self.sample,
            "shard": f"{index}/{count}",
            "seed": self.seed,
            "lists": lists_version(),
        }

    def read(self) -> Iterator[tuple[int, Triple | Rejected]]:
        """The triples of this shard in the file's order, with those that cannot be used.

        Each with its position among those of all shards. The limit counts what can be used, of all
        shards together. A sample is of those that can be used alone. Raises UserError.
        """
        return (item for item in self._all(Counter()) if _of_shard(item[1], *self.shard))

    def _all(self, dropped: Counter) -> Iterator[tuple[int, Triple | Rejected]]:
        """All shards' triples; what no sample can be drawn of is counted in `dropped` by reason."""
        try:
            rows: Iterable[Triple | Rejected] = triples.read(self.path, self.critic)
            if self.sample is not None:
                rows = triples.sample(_usable(rows, dropped), self.sample, self.seed)
            left = self.limit
            for position, row in enumerate(rows):
                if isinstance(row, Triple) and left is not None:
                    if not left:
                        return
                    left -= 1
                yield position, row
        except (OSError, ValueError) as error:
            raise UserError(f"--triples={self.path}: {error}") from error

    def count(self) -> tuple[int, dict[str, int]]:
        """How many rows `read` gives, and drops by reason (all shards'): a pass over the file.

        Raises UserError if no triple of it, of all shards, can be used.
        """
        dropped: Counter = Counter()
        total, usable, found = 0, 0, Counter()
        for _, row in self._all(dropped):
            total += _of_shard(row, *self.shard)
            if isinstance(row, Triple):
                usable += 1
            else:
                found[row.reason] += 1
        if not usable and self.sample is not None:
            raise UserError(
                f"--sample={self.sample} draws nothing of --triples={self.path}: in SODA's ratios "
                f"it needs triples of each of {', '.join(triples.SODA_RATIOS)}"
            )
        if not usable:
            why = ", ".join(f"{n} {reason!r}" for reason, n in (found + dropped).most_common(3))
            raise UserError(
                f"--triples={self.path} has no triple that can be used (lines: {why or 'none'}): "
                'wanted are JSON lines such as {"head": "PersonX eats", "relation": "xWant", '
                '"tail": "to rest"}, a .tsv of these three, or the Parquet of the sodaverse'
            )
        return total, dict(dropped.most_common())


def _usable(rows: Iterable[Triple | Rejected], dropped: Counter) -> Iterator[Triple]:
    for row in rows:
        if isinstance(row, Triple):
            yield row
        else:
            dropped[row.reason] += 1


def lists_version(folder: Path = Path(__file__).parent) -> str:
    """A hash of the words and names that every record is judged and made with."""
    digests = (hashlib.sha256((folder / name).read_bytes()).digest() for name in LISTS)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:12]


def _of_shard(row: Triple | Rejected, index: int, count: int) -> bool:
    if isinstance(row, Triple):
        return triples.shard(row, index, count)
    return zlib.crc32(row.id.encode()) % count == index


def works(
    rows: Iterable[tuple[int, Triple | Rejected]], settings: postprocess.Settings
) -> Iterator[Work]:
    """The work that each row is."""
    for position, row in rows:
        if isinstance(row, Rejected):
            yield Work(row.id, position, lambda row=row: _at_once(row), result_of)
        else:
            yield Work(row.id, position, lambda row=row: distil.distil(row, settings), result_of)


def _at_once(rejected: Rejected) -> Stage[Rejected]:
    return rejected
    yield  # what makes it a generator


def result_of(record: Record, position: int) -> Result:
    """What is written of a record, and of one that says again what another has said."""
    row, origin = schema.soda_row(record), schema.provenance(record)
    origin = {"position": position, **origin}
    return Result(
        {
            "soda": json.dumps(row, ensure_ascii=False),
            "provenance": json.dumps(origin, ensure_ascii=False),
        },
        bytes.fromhex(postprocess.duplicate_key(record)),
        {"rejected": duplicate_line(row, origin)},
    )


def duplicate_line(row: dict[str, Any], origin: dict[str, Any]) -> str:
    """The line of rejected.jsonl for a record that says again what one before it has said."""
    known = {"row": row, "provenance": origin}
    again = Rejected(origin["id"], "dedup", "duplicate dialogue", known)
    return rejected_line(again, origin["position"])


def key_of(row: dict[str, Any]) -> bytes:
    """The key by which duplicates of a row of soda.jsonl are found."""
    return bytes.fromhex(postprocess.duplicate_key(schema.from_row(row)))


def canary_labels(path: Path) -> dict[str, str]:
    """Canary's labels: JSON lines of id and label. Raises UserError."""
    labels = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                labels[str(row["id"])] = str(row["label"])
    except OSError as error:
        raise UserError(f"--canary_labels={path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}:{number}: not {{"id": ..., "label": "__casual__"}} ({error})'
        ) from error
    return labels


def parquet(folder: Path, *, wanted: bool) -> None:
    """soda.parquet of soda.jsonl; not `wanted`, one of before is removed."""
    if wanted:
        write_parquet(folder)
    else:
        (folder / "soda.parquet").unlink(missing_ok=True)


def write_parquet(folder: Path, rows: int = 10_000) -> None:
    """soda.parquet beside soda.jsonl, with the published files' schema."""
    import pyarrow
    import pyarrow.parquet

    partial = folder / ".soda.parquet.partial"
    columns = schema.parquet_schema()
    with (
        open(folder / "soda.jsonl", encoding="utf-8") as lines,
        pyarrow.parquet.ParquetWriter(partial, columns) as writer,
    ):
        while block := list(itertools.islice(lines, rows)):
            table = pyarrow.Table.from_pylist([json.loads(line) for line in block], columns)
            writer.write_table(table)
    partial.replace(folder / "soda.parquet")
