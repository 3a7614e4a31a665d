"""Post-process conversations without a model: filters, other names, duplicates (section 3.1).

Pure functions of one record, or of one chunk of a corpus. A run of `co3` ends each triple with
them. `clean` applies them to a finished corpus, on one machine or by Apache Beam.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import resolve
from cosmo.tasks import namebook
from data_pipeline.calls.outputs import Result
from data_pipeline.calls.requests import Rejected
from data_pipeline.calls.run import rejection
from data_pipeline.co3 import filters, names, prompts, schema, texts
from data_pipeline.co3.schema import Record

# The filters by name, in the paper's order: a report counts rejections under these.
FILTERS = ("lexical", "turns", "speakers", "human", "canary", "moderation", "commonsense")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all stages. The defaults are the paper's, but it also asked a moderation service.

    `canary` maps a record's id to Canary's label, None if there are no labels.
    """

    seed: int = 0
    prompts: prompts.Prompts = dataclasses.field(default_factory=prompts.load)
    names: namebook.Namebook = dataclasses.field(default_factory=namebook.load)
    retries: int = 2
    as_published: bool = False  # `dialogue` and `narrative` list what it changes
    no_context: bool = False  # `distil.without_context` makes all dialogues
    wanted_turns: int = 6
    least_turns: int = 4
    most_turns: int = 20
    canary: Mapping[str, str] | None = None
    ask_human: bool = True
    ask_moderation: bool = False
    moderation_threshold: float = 0.5
    ask_commonsense: bool = True


def postprocess(record: Record, settings: Settings = Settings()) -> Record | Rejected:
    """Return the record with other names, or its rejection. A second time changes nothing."""
    return check(record, settings) or names.replace(record, settings.names, settings.seed)


def check(record: Record, settings: Settings = Settings()) -> Rejected | None:
    """Return the rejection by the first filter that drops the record, None if it passes all."""
    for name, reason_of in _filters(settings):
        reason = reason_of(record)
        if reason:
            return rejected_with(Rejected(record.id, name, reason, {}), record)
    return None


def _filters(settings: Settings) -> Iterator[tuple[str, Callable[[Record], str | None]]]:
    least, most = settings.least_turns, settings.most_turns
    yield "lexical", filters.lexical
    yield "turns", functools.partial(filters.turn_count, least=least, most=most)
    yield "speakers", filters.speaker_count
    yield "human", functools.partial(filters.human_speakers, names=settings.names)
    yield "canary", functools.partial(filters.canary, labels=settings.canary)
    threshold = settings.moderation_threshold
    yield "moderation", functools.partial(filters.moderation, threshold=threshold)
    yield "commonsense", filters.head_event


def rejected_with(rejected: Rejected, record: Record) -> Rejected:
    """Return the rejection with the record's row and provenance."""
    known = {"row": schema.soda_row(record), "provenance": schema.provenance(record)}
    return dataclasses.replace(rejected, record={**rejected.record, **known})


def duplicate_key(record: Record) -> bytes:
    """Return a key of 12 bytes, equal for dialogues that differ in names, case and punctuation.

    Paraphrases have other keys.
    """
    # Each record gets names of its own, so the same dialogue comes back with others.
    people = set(" ".join((record.x, record.y, record.z, *record.speakers)).split())
    # The package's list, not the run's, so that keys of several corpora agree.
    names_known = namebook.load()
    words = texts.words("\n".join(record.dialogue))
    said = [word for word in words if word not in people and word not in names_known]
    # 96 bits: among SODA's 1.5 million dialogues two get one key by chance with odds of 1e-17.
    return hashlib.blake2b(" ".join(said).casefold().encode(), digest_size=12).digest()


def result_of(record: Record, position: int) -> Result:
    """Return the lines of a record, and the rejection in their place for a duplicate."""
    row = schema.soda_row(record)
    origin = {"position": position, **schema.provenance(record)}
    lines = {"soda": row, "provenance": origin}
    lines = {name: json.dumps(fields, ensure_ascii=False) for name, fields in lines.items()}
    # Both are made here, in a worker. Which is written shows only in the order of the input.
    return Result(lines, duplicate_key(record), duplicate_lines(row, origin))


def duplicate_lines(row: dict[str, Any], origin: dict[str, Any]) -> dict[str, str]:
    """Return the lines of a record whose dialogue an earlier record has."""
    known = {"row": row, "provenance": origin}
    rejected = Rejected(origin["id"], "dedup", "duplicate dialogue", known)
    return rejection(rejected, origin["position"]).lines


def key_of(row: dict[str, Any]) -> bytes:
    """Return the duplicate key of a row of soda.jsonl."""
    return duplicate_key(schema.from_row(row))


# A finished corpus: files -> chunks -> rows -> results.


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a corpus: byte ranges of its files, or the rows themselves (Parquet).

    `first` is the position of the first row in the whole input. `spans` are (path, start, length)
    of the rows and, where it exists, of their provenance.
    """

    first: int
    count: int  # of rows
    spans: tuple[tuple[str, int, int], ...] = ()
    rows: tuple[bytes, ...] = ()

    def read(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (position, row, provenance or b"") as JSON."""
        columns = []
        for path, start, length in self.spans:
            with resolve(path).open("rb") as file:
                file.seek(start)
                # Else the end of the last line would begin an empty row.
                columns.append(file.read(length).removesuffix(b"\n").split(b"\n"))
        if len(columns) == 2:
            for number, (row, origin) in enumerate(zip(*columns, strict=True)):
                yield self.first + number, row, origin
        else:
            rows = (row for row in (columns[0] if columns else self.rows) if row.strip())
            yield from ((self.first + number, row, b"") for number, row in enumerate(rows))


def chunks(paths: Iterable[Any], size: int) -> Iterator[Chunk]:
    """Yield the chunks of files and folders, of `size` rows: SODA as JSON lines or Parquet.

    A folder is that of a run, or holds such files. A path may be a pattern (DIR/*.jsonl). Raises
    UserError.
    """
    first = 0
    for path in paths:
        try:
            for file in _files(resolve(path)):
                for chunk in _chunks_of(file, first, size):
                    yield chunk
                    first += chunk.count
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}", setting="input") from error


def _files(path: Any) -> list[Any]:
    if "*" in path.name:
        found = sorted(path.parent.glob(path.name))
    # A run's folder has rejected.jsonl too, which is not a corpus.
    elif path.is_dir() and not (path / "soda.jsonl").exists():
        found = sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")])
    else:
        return [path / "soda.jsonl" if path.is_dir() else path]
    if not found:
        raise UserError(f"{path} holds no .jsonl or .parquet", setting="input")
    return found


def _chunks_of(path: Any, first: int, size: int) -> Iterator[Chunk]:
    """Yield the chunks of one file, which is read through once."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=size):
                # The rows themselves, because a row of Parquet has no byte range. As JSON, so that
                # both formats are read alike from here on.
                rows = tuple(json.dumps(row).encode() for row in batch.to_pylist())
                yield Chunk(first, len(rows), rows=rows)
                first += len(rows)
        return
    places = [path]
    beside = path.with_name("provenance.jsonl")
    if path.name == "soda.jsonl" and beside.exists():
        places.append(beside)
    # Byte ranges instead of rows, because workers then read in parallel, and the rows do not
    # travel from this process to them.
    starts = [0] * len(places)
    with path.open("rb") as rows, places[-1].open("rb") as origins:
        streams = [rows, origins][: len(places)]
        while True:
            blocks = [list(itertools.islice(stream, size)) for stream in streams]
            if len(set(map(len, blocks))) > 1:
                raise UserError(
                    f"{path} and {beside} have different numbers of lines: they are not of one run",
                    setting="input",
                )
            if not blocks[0]:
                return
            lengths = [sum(map(len, block)) for block in blocks]
            spans = tuple(zip(map(str, places), starts, lengths, strict=True))
            starts = [start + length for start, length in zip(starts, lengths, strict=True)]
            # Each line beside a line of provenance counts; elsewhere empty lines do not.
            count = (
                len(blocks[0]) if len(places) == 2 else sum(map(bool, map(bytes.strip, blocks[0])))
            )
            yield Chunk(first, count, spans)
            first += count


def record_of(row: bytes, origin: bytes) -> tuple[Record, dict[str, Any]]:
    """Return the record of a row, and its provenance ({} without one).

    Raises ValueError for anything else than JSON with SODA's fields.
    """
    try:
        known = json.loads(origin) if origin else {}
        return schema.from_row(json.loads(row), known), {**known}
    except (TypeError, AttributeError, RecursionError) as error:  # JSON, but no object
        raise ValueError(str(error)) from error


def process_row(position: int, row: bytes, origin: bytes, settings: Settings) -> Result:
    """Return the lines of one row: filtered and renamed, or its rejection.

    A row without SODA's fields is rejected as "broken row", with the fault as `detail`.
    """
    try:
        record, known = record_of(row, origin)
    except ValueError as error:
        about = {"detail": str(error), "line": row[:500].decode("utf-8", "replace")}
        return rejection(Rejected(f"line-{position}", "read", "broken row", about), position)
    # The position among the triples stays, because shards are merged by it.
    position = known.get("position", position)
    found = postprocess(record, settings)
    return rejection(found, position) if isinstance(found, Rejected) else result_of(found, position)


def process_chunk(chunk: Chunk, settings: Settings) -> list[Result]:
    """Return the results of a chunk's rows, in their order."""
    return [process_row(*item, settings) for item in chunk.read()]
