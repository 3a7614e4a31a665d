"""Read a cache of packed rows, which `python -m cosmo cache` has written: format, order, position.

A cache is a folder of ArrayRecord files and a manifest. A record is one row: its tokens and segment
numbers as one vector of integers, then the ids of its examples. Training reads it without
TensorFlow.
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
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.data.datasets import DatasetConfig, HostBatch, TrainBatch

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
WORK = ".work"  # the folder of an unfinished cache's plan and notes
READ_THREADS, BATCHES_AHEAD = 4, 8
CIPHER_ROUNDS = 4  # of the index shuffle: Grain's own number


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """The format of a row: inputs, targets, then (if packed) the segment of each position.

    All are little-endian integers of `dtype`. `inputs` and `targets` are lengths in tokens.
    """

    # Decoder inputs and loss weights are not stored, because they follow from targets and
    # segments: see `features`.

    inputs: int
    targets: int
    packed: bool
    dtype: str  # "uint16" or "int32"

    @property
    def width(self) -> int:
        """Return the number of integers in a row."""
        return (self.inputs + self.targets) * (2 if self.packed else 1)

    @property
    def size(self) -> int:
        """Return the bytes of a row, without the ids of its examples."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def feature_names(self) -> list[str]:
        """Return the names of the arrays that `features` returns."""
        return sorted(self.features(np.zeros((1, self.width), np.int32)))

    def encode(self, row: np.ndarray, names: Sequence[str]) -> bytes:
        """Return the record of `row`, int [width], and of its examples' ids."""
        # Ids are stored so that `cache --show` can name the examples of a row.
        # Ids are separated by line breaks, so one in an id becomes a space.
        text = "\n".join(name.replace("\n", " ") for name in names)
        return row.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes() + text.encode()

    def decode(self, records: Sequence[bytes]) -> np.ndarray:
        """Return the rows of records, int32 [records, width]."""
        # One conversion for all records is faster than one for each.
        joined = b"".join([record[: self.size] for record in records])
        rows = np.frombuffer(joined, np.dtype(self.dtype).newbyteorder("<"))
        return rows.reshape(len(records), self.width).astype(np.int32)

    def names(self, record: bytes) -> list[str]:
        """Return the ids of a record's examples, in the order of its segments."""
        text = record[self.size :].decode()
        return text.split("\n") if text else []

    def features(self, rows: np.ndarray) -> HostBatch:
        """Return the batch of `rows`, int32 [B, width], as SeqIO's EncDecFeatureConverter does.

        Decoder inputs are the targets one position later, with 0 at the start of each segment. The
        loss weight of padding is 0, of all other targets 1.
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
    """Return the file name of shard `shard` (from 0)."""
    return f"rows-{shard:05d}-of-{num_shards:05d}.arrayrecord"


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return a hash of a cache's format and of all its bytes, 32 hexadecimal digits."""
    # By the shards' checksums, not by paths: a cache may be moved.
    parts = [manifest["format"], [shard["sha256"] for shard in manifest["shards"]]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Cache:
    """An opened cache: its `manifest`, and `rows` rows, which `records` reads by number."""

    def __init__(self, path: str):
        """Open the cache at `path`. Raises UserError if a file is missing or has another size."""
        # Sizes only: a checksum over terabytes would take hours. ArrayRecord compares the checksum
        # of each record when it reads it.
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
        # Without empty shards, each row number is in exactly one range of `starts`.
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
        """Return the records of rows `numbers`, in that order. Raises UserError for damage."""
        numbers = np.asarray(numbers, np.int64)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        found: list[bytes] = [b""] * len(numbers)
        for index in np.unique(shards):  # one call a shard: each call has a cost of its own
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
        """Return (the manifest's entry of the shard, position in it) of row `number`."""
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.shards[index], number - int(self.starts[index])

    def _reader(self, index: int):
        from array_record.python import array_record_module

        with self._lock:  # Grain's threads read at once
            if index not in self._readers:
                shard = self.shards[index]
                reader = array_record_module.ArrayRecordReader(
                    str(self.path / shard["file"]),
                    # Rows are read in a random order, by threads of ours: no reading ahead and no
                    # threads of its own.
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
                if not reader.ok() or reader.num_records() != shard["rows"]:
                    raise self._damaged(shard, "is damaged: its index cannot be read")
                self._readers[index] = reader
            return self._readers[index]

    def _damaged(self, shard: Mapping[str, Any], what: str) -> UserError:
        return UserError(
            f"cache shard {self.path / shard['file']} {what}; repeat the command that wrote the "
            "cache (python -m cosmo cache): it replaces this shard"
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
        if (path / WORK).exists():
            raise UserError(
                f"the cache {path} is not finished; repeat its command (python -m cosmo cache)"
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


def open_cache(config: DatasetConfig, vocabulary: Vocabulary | None = None) -> Cache:
    """Open the cache at `config.cache_path` and return it.

    Raises UserError that names the first difference from `config` or from `vocabulary`.
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
def _epoch_seed(seed: int, epoch: int) -> int:
    # A hash, so that neighbouring seeds and epochs give unrelated orders; Grain takes 32 bits.
    digest = hashlib.sha256(f"rows/{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def row_numbers(start: int, stop: int, rows: int, seed: int | None) -> np.ndarray:
    """Return the numbers of the rows that are read at counts [start, stop), int64 [stop - start].

    Each epoch of the cache's `rows` rows is a permutation by (seed, epoch). With seed None it is
    the order of the files.
    """
    if seed is None:
        return np.arange(start, stop, dtype=np.int64) % rows
    # A shuffle that computes a row's number from its count: a position is one number, and no list
    # of all rows is held.
    from grain.experimental import index_shuffle

    numbers = np.empty(stop - start, np.int64)
    for place, count in enumerate(range(start, stop)):
        epoch, index = divmod(count, rows)
        numbers[place] = index_shuffle(
            index, max_index=rows - 1, seed=_epoch_seed(seed, epoch), rounds=CIPHER_ROUNDS
        )
    return numbers


def starting_count(cache: Cache, position: Any, seed: int | None) -> int:
    """Return the rows that all processes had read at a checkpoint's `position`."""
    if not isinstance(position, Mapping):  # None of a run that read SeqIO
        return 0
    if position.get("cache") != cache.fingerprint:
        log.warning(
            "the checkpoint was trained from another cache: reading %s from its beginning",
            cache.path,
        )
        return 0
    if position.get("seed") != seed:
        log.warning("another RANDOM_SEED: reading the rest of the cache in another order")
    return int(position["rows"])


class _Batches:
    """This process's rows of each batch, by the batch's number: a data source for Grain."""

    def __init__(self, cache, batch_size: int, start: int, seed, shard: int, num_shards: int):
        self.cache, self.batch_size, self.start, self.seed = cache, batch_size, start, seed
        share = batch_size // num_shards
        self.mine = slice(shard * share, (shard + 1) * share)

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size  # Grain asks for a length; training ends by steps

    def __getitem__(self, number: int) -> TrainBatch:
        first = self.start + number * self.batch_size
        after = first + self.batch_size
        rows = row_numbers(first, after, self.cache.rows, self.seed)
        records = self.cache.records(rows[self.mine])
        # One number for all processes, so that batch sizes, processes and devices may change
        # between runs, and an epoch still has every row once.
        position = {"rows": after, "cache": self.cache.fingerprint, "seed": self.seed}
        arrays = self.cache.format.features(self.cache.format.decode(records))
        return TrainBatch(arrays, position, rows)


def batches(
    config: DatasetConfig, position: Any, num_steps: int | None, shard: int, num_shards: int
) -> Iterator[TrainBatch]:
    """Yield endless batches of a cache; see `reader.train_batches`.

    A batch that reaches the end of an epoch also has the first rows of the next.
    """
    # Imported by the thread that trains, before any other thread starts: Grain replaces Python's
    # import function while it loads (see `seqio_reader`).
    import grain

    cache = open_cache(config)
    seed = (config.seed or 0) if config.shuffle else None
    start = starting_count(cache, position, seed)
    log.info("training from the cache %s: %s", cache.path, cache)
    if start:
        log.info(
            "continuing after %s rows, %.2f epochs of the cache", f"{start:,}", start / cache.rows
        )
    wanted = start + (num_steps or 0) * config.batch_size
    if wanted > cache.rows:
        log.info(
            "the run needs %s rows, the cache has %s: reading it %.1f times, each time in another "
            "order",
            f"{wanted:,}",
            f"{cache.rows:,}",
            wanted / cache.rows,
        )
    source = _Batches(cache, config.batch_size, start, seed, shard, num_shards)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    with contextlib.closing(
        iter(grain.MapDataset.source(source).to_iter_dataset(options))
    ) as ahead:
        yield from ahead
