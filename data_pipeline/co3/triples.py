"""Read commonsense triples from the files they are published in (Kim et al. 2023, section 2.2).

Three formats: ATOMIC-10X as JSON lines, ATOMIC-2020 as JSON lines or .tsv, and the Parquet of the
sodaverse, where names are drawn already. The paper uses six relations (appendix A.1). All other
triples, and broken lines, become `Rejected`, to be counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import files, json_lines
from cosmo.engine.base.draws import fraction_bits
from cosmo.engine.base.errors import UserError
from cosmo.tasks import namebook, paper_tables
from data_pipeline.calls.requests import Rejected
from data_pipeline.co3.prompts import RELATIONS

# Table 3: the share of each relation in SODA, in percent (rounded there: they add up to 101).
SODA_RATIOS = {name: share for name, (share, _) in paper_tables.SODA["relations"].items()}
# The recall at which ATOMIC-10X's critic keeps a triple, as its columns are called.
CRITICS = ("rec_0.5", "rec_0.6", "rec_0.7", "rec_0.8", "rec_0.9")
_SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid"}
_SPLITS |= {"dev": "valid", "test": "test"}
# Files that outputs depend on.
LISTS = (Path(__file__).with_name("words.toml"), namebook.DEFAULT)
_BLANK = re.compile(r"_{2,}|\[blank\]", re.IGNORECASE)
_PERSON = re.compile(r"\bperson\s?([xyz])(?=\b|s\b)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Triple:
    """Head and tail with PersonX, PersonY and PersonZ in them, and the relation between them.

    `id` is a hash of the content, so it stays the same in a reordered or extended file. `index` is
    the row in the file, from 0. `names` are (X, Y, Z) and `literal` the sentence where the source
    drew names already, else empty.
    """

    id: str
    head: str
    relation: str
    tail: str
    index: int
    split: str = "train"
    names: tuple[str, str, str] = ("", "", "")
    literal: str = ""


def read(path: str | Path, critic: str | None = None) -> Iterator[Triple | Rejected]:
    """Yield the triples of a file, in its order, each as a Triple or as Rejected with a reason.

    Args:
        path: .parquet is the sodaverse's; .tsv has head, relation and tail between tabs; any other
            name has JSON lines.
        critic: for ATOMIC-10X, one of CRITICS: keep the triples that the critic keeps at that
            recall. None keeps all.

    Raises:
        ValueError: the critic is unknown.
    """
    if critic is not None and critic not in CRITICS:
        raise ValueError(f"critic={critic!r} is none of {', '.join(CRITICS)}")
    readers = {".parquet": _parquet, ".tsv": _tsv}
    # A table may be compressed: head.tsv.gz.
    suffixes = [s for s in Path(path).suffixes if s[1:] not in files.ENDINGS]
    rows = readers.get((suffixes or [""])[-1], _json_lines)(Path(path))
    seen: set[int] = set()
    for index, row in rows:
        triple = row if isinstance(row, Rejected) else _triple(index, row, critic)
        if isinstance(triple, Triple):
            number = int(triple.id, 16)  # eight bytes each: SODA's 2.2M triples fit
            if number in seen:
                # The first stays, so that an extended file keeps its records.
                triple = _reject(triple.id, "duplicate", row)
            seen.add(number)
        yield triple


def shard(row: Triple | Rejected, index: int, count: int) -> bool:
    """Return whether the row is in shard `index` (from 0) of `count`: each is in exactly one."""
    # By the content, so that a reordered or extended file keeps its shards. The id of a rejected
    # row may be no hash ("line-5").
    number = int(row.id, 16) if isinstance(row, Triple) else zlib.crc32(row.id.encode())
    return number % count == index


def sample(
    triples: Iterable[Triple],
    count: int,
    seed: int = 0,
    ratios: Mapping[str, float] = SODA_RATIOS,
) -> list[Triple]:
    """Return about `count` triples in the given ratios, drawn by seed and id, in the file's order.

    They are fewer where a relation has too few, so that the ratios hold.
    """
    total = sum(ratios.values())
    quotas = {r: round(count * share / total) for r, share in ratios.items()}
    kept: dict[str, list[tuple[int, int, Triple]]] = {r: [] for r in ratios}
    for triple in triples:
        quota = quotas.get(triple.relation, 0)
        if not quota:
            continue
        # A heap for each relation holds its quota of the smallest hashes, so that a file of any
        # size needs the memory of the sample alone.
        heap = kept[triple.relation]
        # Negative, because a heap's first item is its smallest, and here the largest hash goes.
        item = (-fraction_bits(seed, "sample", triple.id), -triple.index, triple)
        if len(heap) < quota:
            heapq.heappush(heap, item)
        # Without the triple, which has no order.
        elif item[:2] > heap[0][:2]:
            heapq.heapreplace(heap, item)
    # The scarcest relation decides how many the others may give.
    scale = min((len(kept[r]) / q for r, q in quotas.items() if q), default=0.0)
    drawn = []
    for relation, heap in kept.items():
        few = round(quotas[relation] * scale)
        drawn += [triple for _, _, triple in heapq.nlargest(few, heap, key=lambda i: i[:2])]
    return sorted(drawn, key=lambda triple: triple.index)


def persons(text: str) -> str:
    """Return the text with `personx`, `Person X` and `person x` written PersonX."""
    return _PERSON.sub(lambda match: f"Person{match[1].upper()}", text)


def content_id(head: str, relation: str, tail: str, names: Iterable[str] = ()) -> str:
    """Return 16 hexadecimal digits, the same for the same triple at any place."""
    text = json.dumps([head, relation, tail, *names], ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _reject(record_id: str, reason: str, record: Any) -> Rejected:
    record = record if isinstance(record, dict) else {"line": record}
    return Rejected(id=record_id, stage="triples", reason=reason, record=record)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (index, line) of a text file, decompressed, without its byte order mark."""
    try:
        with files.opened(path) as lines:
            for index, raw in enumerate(lines):
                yield index, raw if index else raw.removeprefix(files.MARK)
    except files.CORRUPT as error:
        # A missing file is not a damaged one.
        if isinstance(error, OSError):
            raise
        raise ValueError(f"the file is cut short or damaged ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for index, raw in _lines(path):
        if raw.strip():
            try:
                yield index, json_lines.value(raw)
            except ValueError:
                text = raw[:500].decode("utf-8", "replace")
                yield index, _reject(f"line-{index}", "broken line", text)


def _tsv(path: Path) -> Iterator[tuple[int, Any]]:
    for index, raw in _lines(path):
        # Split by hand, because these files are not quoted: a quotation mark is text.
        parts = raw.decode("utf-8", "replace").rstrip("\r\n").split("\t")
        if len(parts) == 3:
            yield index, dict(zip(("head", "relation", "tail"), parts, strict=True))
        elif raw.strip():
            yield index, _reject(f"line-{index}", "broken line", "\t".join(parts)[:500])


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    columns = ("head", "relation", "tail", "x", "y", "z", "x_relations", "named_literal", "split")
    with pyarrow.parquet.ParquetFile(path) as file:
        # Not every file has names or splits.
        present = [name for name in columns if name in file.schema_arrow.names]
        index = 0
        # In batches, because a file may be larger than memory.
        for batch in file.iter_batches(batch_size=8192, columns=present):
            for row in batch.to_pylist():
                yield index, row
                index += 1


def _triple(index: int, row: Any, critic: str | None) -> Triple | Rejected:
    """Return the triple of a row, or its rejection with the first reason that holds."""
    if not isinstance(row, dict):
        return _reject(f"line-{index}", "not an object", str(row)[:500])
    fields = []
    for name in ("head", "relation", "tail"):
        # ATOMIC-10X also calls the tail `inference`.
        value = row.get(name, row.get("inference") if name == "tail" else None)
        if not isinstance(value, str):
            return _reject(f"line-{index}", f"no text in field {name}", row)
        fields.append(" ".join(value.split()))
    head, relation, tail = fields
    drawn = tuple(row.get(key) or "" for key in "xyz")
    if not all(isinstance(name, str) for name in drawn):
        return _reject(f"line-{index}", "no text in field x, y or z", row)
    if not json_lines.is_whole("".join((*fields, *drawn, str(row.get("named_literal"))))):
        return _reject(f"line-{index}", "broken line: half a surrogate pair is no text", row)
    # Later rejections have the id that the triple would have.
    record_id = content_id(head, relation, tail, drawn)
    # Not `not`, because sources without the column use all of these relations.
    if relation not in RELATIONS or row.get("x_relations") is False:
        return _reject(record_id, "relation not used", row)
    if critic is not None:
        if not isinstance(row.get(critic), bool):
            return _reject(record_id, f"no true or false in field {critic}", row)
        if not row[critic]:
            return _reject(record_id, "below the critic", row)
    if not head.strip(" .") or not tail.strip(" ."):
        return _reject(record_id, "empty", row)
    # Annotators wrote it where nothing follows from the head.
    if tail.strip(" .\"'").lower() == "none":
        return _reject(record_id, "none", row)
    if _BLANK.search(head) or _BLANK.search(tail):
        return _reject(record_id, "blank", row)
    if "PersonX" not in persons(head):
        return _reject(record_id, "no PersonX in head", row)
    split = _SPLITS.get(str(row.get("split", "")).lower()) or _split_of(head)
    literal = row.get("named_literal")
    return Triple(
        id=record_id,
        head=head,
        relation=relation,
        tail=tail,
        index=index,
        split=split,
        names=drawn,
        literal=" ".join(literal.split()) if isinstance(literal, str) and drawn[0] else "",
    )


def _split_of(head: str) -> str:
    """Return the split of a triple whose source names none: 80, 10 and 10 percent, as in SODA."""
    # By the head alone: no event is trained on under one relation and evaluated under another.
    tenth = fraction_bits(0, "split", head) % 10
    return "valid" if tenth == 8 else "test" if tenth == 9 else "train"


@dataclasses.dataclass(frozen=True)
class Source:
    """The triples of a run: a file, its critic, a sample in SODA's ratios, a limit, a shard."""

    path: Path
    critic: str | None = None
    sample: int | None = None
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the triples, but for the limit. Raises UserError."""
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                # Both ends and the size: hashing gigabytes would delay every start.
                head = file.read(1 << 20)
                file.seek(max(0, size - (1 << 20)))
                digest = hashlib.sha256(head + file.read()).hexdigest()[:16]
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}", setting="triples") from error
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
        """Yield (position, triple or rejection) of this shard in the file's order.

        The position counts the rows of all shards. The limit counts the usable triples of all
        shards. A sample is drawn from usable triples alone. Raises UserError.
        """
        return (item for item in self._all(Counter()) if shard(item[1], *self.shard))

    def _all(self, dropped: Counter) -> Iterator[tuple[int, Triple | Rejected]]:
        """Yield the rows of all shards; count in `dropped` the reasons of those before a sample."""
        try:
            rows: Iterable[Triple | Rejected] = read(self.path, self.critic)
            if self.sample is not None:
                rows = sample(_usable(rows, dropped), self.sample, self.seed)
            left = self.limit
            for position, row in enumerate(rows):
                if isinstance(row, Triple) and left is not None:
                    if not left:
                        return
                    left -= 1
                yield position, row
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: {error}", setting="triples") from error

    def count(self) -> tuple[int, dict[str, int]]:
        """Return the number of rows that `read` yields, and the drops by reason (of all shards).

        Reads the file once. Raises UserError if no triple of any shard can be used.
        """
        dropped: Counter = Counter()
        total, usable, found = 0, 0, Counter()
        for _, row in self._all(dropped):
            total += shard(row, *self.shard)
            if isinstance(row, Triple):
                usable += 1
            else:
                found[row.reason] += 1
        # All shards count, because one of them may be empty by chance.
        if not usable and self.sample is not None:
            raise UserError(
                f"a sample of {self.sample} from {self.path} is empty: SODA's ratios need triples "
                f"of each of {', '.join(SODA_RATIOS)}",
                setting=("sample", "triples"),
            )
        if not usable:
            why = ", ".join(f"{n} {reason!r}" for reason, n in (found + dropped).most_common(3))
            raise UserError(
                f"{self.path} has no triple that can be used (lines: {why or 'none'}). Give JSON "
                'lines such as {"head": "PersonX eats", "relation": "xWant", "tail": "to rest"}, a '
                ".tsv of these three, or the Parquet of the sodaverse",
                setting="triples",
            )
        return total, dict(dropped.most_common())


@dataclasses.dataclass(frozen=True)
class NoTriples:
    """The source of a run without context: `limit` empty triples, the same in every run."""

    limit: int
    shard: tuple[int, int] = (0, 1)
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the dialogues, but for the limit."""
        index, count = self.shard
        return {
            "triples": "none",
            "no_context": True,
            "critic": None,
            "sample": None,
            "shard": f"{index}/{count}",
            "seed": self.seed,
            "lists": lists_version(),
        }

    def read(self) -> Iterator[tuple[int, Triple]]:
        """Yield (position, empty triple) of this shard."""
        for number in range(self.limit):
            # A hash, as of a triple's content: shards go by it.
            name = hashlib.sha256(f"no context/{self.seed}/{number}".encode()).hexdigest()[:16]
            one = Triple(name, "", "", "", number)
            if shard(one, *self.shard):
                yield number, one

    def count(self) -> tuple[int, dict[str, int]]:
        """Return the number of triples that `read` yields, and no drops."""
        return sum(1 for _ in self.read()), {}


def _usable(rows: Iterable[Triple | Rejected], dropped: Counter) -> Iterator[Triple]:
    for row in rows:
        if isinstance(row, Triple):
            yield row
        else:
            dropped[row.reason] += 1


def lists_version() -> str:
    """Return a hash of the lists of words and names that decide every record."""
    digests = (hashlib.sha256(path.read_bytes()).digest() for path in LISTS)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:12]
