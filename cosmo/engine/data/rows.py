"""The cache of packed rows that `python -m cosmo cache` writes: its format, and training from it.

A cache is a folder of ArrayRecord files and a manifest. A record is one row: its tokens and segment
numbers as one vector of integers, and behind it the names of its examples. Rows are read in an
order of (seed, times read through), by number, so that a position is a count. No TensorFlow.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
NAMES_DIGITS = 5
THREADS, AHEAD = 4, 8  # that read, and batches they may be ahead
ROUNDS = 4  # of the permutation's cipher: Grain's own number


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a row lies in a record: inputs, targets, then (if packed) the segment of each position.

    All are integers of `dtype`, little-endian. What SeqIO's converter gives beyond these follows
    from them, see `features`.
    """

    inputs: int
    targets: int
    packed: bool
    dtype: str  # "uint16" or "int32"

    @property
    def width(self) -> int:
        """Integers in a row."""
        return (self.inputs + self.targets) * (2 if self.packed else 1)

    @property
    def size(self) -> int:
        """Bytes of a row, without the names of its examples."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def feature_names(self) -> list[str]:
        """What `features` gives."""
        return sorted(self.features(np.zeros((1, self.width), np.int32)))

    def encode(self, row: np.ndarray, names: Sequence[str]) -> bytes:
        """A record of `row`, int [width], and of its examples' names."""
        text = "\n".join(name.replace("\n", " ") for name in names)
        return row.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes() + text.encode()

    def decode(self, records: Sequence[bytes]) -> np.ndarray:
        """Rows, int32 [records, width]."""
        joined = b"".join([record[: self.size] for record in records])
        rows = np.frombuffer(joined, np.dtype(self.dtype).newbyteorder("<"))
        return rows.reshape(len(records), self.width).astype(np.int32)

    def names(self, record: bytes) -> list[str]:
        """The names of a record's examples, in the order of its segments."""
        text = record[self.size :].decode()
        return text.split("\n") if text else []

    def features(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of `rows`, int32 [B, width], as SeqIO's EncDecFeatureConverter gives it.

        The decoder reads its targets one position later, from 0 at the start of each segment; the
        loss is of all targets but padding.
        """
        ends = np.cumsum([self.inputs, self.targets, self.inputs, self.targets])
        inputs, targets = rows[:, : ends[0]], rows[:, ends[0] : ends[1]]
        before = np.zeros_like(targets)
        before[:, 1:] = targets[:, :-1]
        batch = {"encoder_input_tokens": inputs, "decoder_target_tokens": targets}
        if self.packed:
            batch["encoder_segment_ids"] = rows[:, ends[1] : ends[2]]
            segments = batch["decoder_segment_ids"] = rows[:, ends[2] : ends[3]]
            before[:, 1:] *= segments[:, 1:] == segments[:, :-1]
        batch["decoder_input_tokens"] = before
        batch["decoder_loss_weights"] = (targets != 0).astype(np.int32)
        return {name: np.ascontiguousarray(array) for name, array in batch.items()}


def shard_name(shard: int, num_shards: int) -> str:
    """The file of shard `shard` (from 0)."""
    return f"rows-{shard:0{NAMES_DIGITS}d}-of-{num_shards:0{NAMES_DIGITS}d}.arrayrecord"


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """What tells a cache from others: a hash of its format and of all its bytes."""
    parts = [manifest["format"], [shard["sha256"] for shard in manifest["shards"]]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Cache:
    """An opened cache: `manifest`, `rows` (their number), and the rows themselves by number.

    Opening looks at every file's size; a record's own checksum is compared when it is read.
    """

    def __init__(self, path: str):
        if is_remote(path):
            raise UserError(
                f"{path}: a cache is read from a local or mounted folder; copy it there, or mount "
                "the bucket",
                setting="CACHE_PATH",
            )
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.fingerprint = self.manifest["fingerprint"]
        self.format = RowFormat(**self.manifest["format"])
        self.shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        self.starts = np.cumsum([0] + [shard["rows"] for shard in self.shards])
        self.rows = int(self.starts[-1])
        for shard in self.shards:
            file = self.path / shard["file"]
            if not file.exists():
                raise self._damaged(shard, "is missing")
            size = file.stat().st_size
            if size != shard["bytes"]:
                raise self._damaged(shard, f"has {size:,} bytes instead of {shard['bytes']:,}")
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def records(self, numbers: Sequence[int] | np.ndarray) -> list[bytes]:
        """The records of rows `numbers`, in that order; UserError for a damaged one."""
        numbers = np.asarray(numbers, np.int64)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        found: list[bytes] = [b""] * len(numbers)
        for index in np.unique(shards):
            places = np.flatnonzero(shards == index)
            positions = (numbers[places] - self.starts[index]).tolist()
            try:
                records = self._reader(int(index)).read(positions)
            except (RuntimeError, ValueError, IndexError) as error:
                reason = str(error).split(";")[0]
                raise self._damaged(self.shards[index], f"is damaged: {reason}") from error
            for place, record in zip(places, records, strict=True):
                if len(record) < self.format.size:
                    raise self._damaged(self.shards[index], "holds rows of another length")
                found[place] = record
        return found

    def place(self, number: int) -> tuple[dict[str, Any], int]:
        """(the manifest's entry of the shard, position in it) of row `number`."""
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.shards[index], number - int(self.starts[index])

    def _reader(self, index: int):
        from array_record.python import array_record_module

        with self._lock:
            if index not in self._readers:
                shard = self.shards[index]
                reader = array_record_module.ArrayRecordReader(
                    str(self.path / shard["file"]),
                    # For reading here and there: no reading ahead, no threads of its own.
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
                if not reader.ok() or reader.num_records() != shard["rows"]:
                    raise self._damaged(shard, "is damaged: its index cannot be read")
                self._readers[index] = reader
            return self._readers[index]

    def _damaged(self, shard: Mapping[str, Any], what: str) -> UserError:
        return UserError(
            f"cache shard {self.path / shard['file']} {what}; the command that wrote the cache "
            "(python -m cosmo cache), given again, replaces it"
        )

    def __str__(self) -> str:
        totals, manifest = self.manifest["totals"], self.manifest
        positions = self.rows * (self.format.inputs + self.format.targets)
        padding = 1 - (totals["input_tokens"] + totals["target_tokens"]) / max(positions, 1)
        epochs = manifest["epochs"]
        return (
            f"{self.rows:,} rows of {manifest['name']}, {manifest['split']} ({epochs} "
            f"epoch{'s' if epochs > 1 else ''}, {totals['examples'] / max(self.rows, 1):.2f} "
            f"examples a row, {padding:.1%} padding)"
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        if (path / ".work").exists():
            raise UserError(
                f"the cache {path} is not finished; give its command (python -m cosmo cache) again"
            ) from None
        raise UserError(
            f"no cache in {path}: it has no {MANIFEST}; python -m cosmo cache makes one",
            setting="CACHE_PATH",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path / MANIFEST}: {error}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise UserError(f"{path} is a cache of format {version}; this program reads {VERSION}")
    return manifest


def open_cache(config: Any, vocabulary: Any = None) -> Cache:
    """Return the cache at `config.cache_path`, checked against the settings and a vocabulary.

    Raises UserError naming the first difference.
    """
    cache = Cache(config.cache_path)
    manifest, ours = cache.manifest, dict(config.task_feature_lengths)
    if vocabulary is not None:
        theirs = manifest["vocabulary"]
        if theirs["fingerprint"] != vocabulary.fingerprint:
            raise UserError(
                f"vocabulary mismatch: the cache {cache.path} was made with {theirs['path']} "
                f"({theirs['size']} pieces), this run has {vocabulary.path} ({vocabulary.size} "
                "pieces)",
                setting=("CACHE_PATH", "VOCABULARY_PATH"),
            )
    lengths = {"inputs": cache.format.inputs, "targets": cache.format.targets}
    for what, theirs, wanted, names in (
        ("lengths", lengths, ours, "TASK_FEATURE_LENGTHS"),
        ("packing", cache.format.packed, config.pack, "train/datasets.DatasetConfig.pack"),
        ("features", manifest["features"], cache.format.feature_names, "CACHE_PATH"),
        ("split", manifest["split"], config.split, "train/datasets.DatasetConfig.split"),
    ):
        if theirs != wanted:
            raise UserError(
                f"the cache {cache.path} has other {what}: {theirs} there, {wanted} here",
                setting=("CACHE_PATH", names),
            )
    if not cache.rows:
        raise UserError(f"the cache {cache.path} holds no rows")
    return cache


@functools.lru_cache(maxsize=64)
def _seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"rows/{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def row_numbers(start: int, stop: int, rows: int, seed: int | None) -> np.ndarray:
    """Which rows, int64 [stop - start], of a cache of `rows` are read at counts [start, stop).

    Each time through is a permutation of all rows, of (seed, how many times before); seed None:
    the order of the files.
    """
    if seed is None:
        return np.arange(start, stop, dtype=np.int64) % rows
    from grain.experimental import index_shuffle

    numbers = np.empty(stop - start, np.int64)
    for place, count in enumerate(range(start, stop)):
        epoch, index = divmod(count, rows)
        numbers[place] = index_shuffle(
            index, max_index=rows - 1, seed=_seed(seed, epoch), rounds=ROUNDS
        )
    return numbers


def starting_count(cache: Cache, position: Any, seed: int | None) -> int:
    """Rows that all processes have read before, according to a checkpoint's `position`."""
    if not isinstance(position, Mapping):
        return 0
    if position.get("cache") != cache.fingerprint:
        log.warning(
            "the checkpoint was trained from another cache: %s is read from its beginning",
            cache.path,
        )
        return 0
    if position.get("seed") != seed:
        log.warning("another RANDOM_SEED: from here on the cache is read in another order")
    return int(position["rows"])


class _Batches:
    """Batches by number, for Grain: this process's rows of each."""

    def __init__(self, cache, batch_size: int, start: int, seed, shard: int, num_shards: int):
        self.cache, self.batch_size, self.start, self.seed = cache, batch_size, start, seed
        share = batch_size // num_shards
        self.mine = slice(shard * share, (shard + 1) * share)

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, number: int) -> tuple[dict[str, np.ndarray], Any, np.ndarray]:
        first = self.start + number * self.batch_size
        after = first + self.batch_size
        rows = row_numbers(first, after, self.cache.rows, self.seed)
        records = self.cache.records(rows[self.mine])
        position = {"rows": after, "cache": self.cache.fingerprint, "seed": self.seed}
        return self.cache.format.features(self.cache.format.decode(records)), position, rows


def batches(
    config: Any, position: Any, num_steps: int | None, shard: int, num_shards: int
) -> Iterator[tuple[dict[str, np.ndarray], Any, np.ndarray]]:
    """Endless (features, position, row numbers) of the cache; see `reader.train_batches`.

    A batch that reaches the end of the rows goes on with the next time through.
    """
    import grain  # by the thread that trains, before any other thread starts: see `seqio_reader`

    cache = open_cache(config)
    seed = (config.seed or 0) if config.shuffle else None
    start = starting_count(cache, position, seed)
    log.info("training from the cache %s: %s", cache.path, cache)
    if start:
        log.info(
            "reading goes on behind %s rows, %.2f times through", f"{start:,}", start / cache.rows
        )
    wanted = start + (num_steps or 0) * config.batch_size
    if wanted > cache.rows:
        log.info(
            "the run needs %s rows and the cache holds %s: it is read %.1f times, each time in "
            "another order",
            f"{wanted:,}",
            f"{cache.rows:,}",
            wanted / cache.rows,
        )
    source = _Batches(cache, config.batch_size, start, seed, shard, num_shards)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    with contextlib.closing(
        iter(grain.MapDataset.source(source).to_iter_dataset(options))
    ) as ahead:
        yield from ahead
