"""Settings and types of data: packed batches for training, rows for evaluation.

`reader` reads them, from SeqIO tasks or from a cache of packed rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cosmo.engine.base.errors import UserError

HostBatch = dict[str, np.ndarray]
FEATURES = (
    "encoder_input_tokens",
    "encoder_segment_ids",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_segment_ids",
    "decoder_loss_weights",
)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Settings of a dataset. Field names are those of T5X's `utils.DatasetConfig`.

    `mixture_or_task_name` is a name in SeqIO's registry, or a function that registers tasks and
    returns a name. The reader process calls that function, so it must pickle. `module` is imported
    first. With `cache_path`, training reads a cache of packed rows (see `cache_reading`).
    """

    mixture_or_task_name: str | Callable[[], str]
    task_feature_lengths: Mapping[str, int]
    split: str = "train"
    batch_size: int = 128
    shuffle: bool = True
    seed: int | None = 0  # None: SeqIO draws one at every start
    use_cached: bool = False
    pack: bool = True
    module: str | None = None
    cache_path: str | None = None

    def __post_init__(self):
        check_lengths(self.task_feature_lengths)  # gin gives any value


class TrainBatch(NamedTuple):
    """A training batch: this process's rows, and the reading position after it.

    `position` is JSON from which `reader.train_batches` continues after this batch. It is the same
    on every process, and None if SeqIO reads the data. `rows` are the numbers in their cache of the
    whole batch's rows, of all processes, or None.
    """

    arrays: HostBatch
    position: Any = None
    rows: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """An example: its text, and the tokens that a model reads.

    Generated answers begin with `prefix_ids`; see `decoding.decode`. Scores do not read them.
    """

    id: str
    inputs: str
    input_ids: tuple[int, ...]
    targets: str | None = None
    target_ids: tuple[int, ...] | None = None
    cut: bool = dataclasses.field(default=False, repr=False)  # fingerprints are of the repr
    prefix_ids: tuple[int, ...] = dataclasses.field(default=(), repr=False)


def check_lengths(lengths: Any) -> None:
    """Raise UserError unless `lengths` gives tokens of both features."""
    if not isinstance(lengths, Mapping) or not {"inputs", "targets"} <= set(lengths):
        raise UserError(
            f"task_feature_lengths={lengths!r}; give tokens of both features, such as "
            "{'inputs': 512, 'targets': 128}",
            setting="TASK_FEATURE_LENGTHS",
        )


def make_batch(
    rows: list[Row], batch_size: int, inputs_length: int, targets_length: int | None
) -> HostBatch:
    """Return a batch of unpacked rows, int32 [batch_size, length], padded with zeros.

    Missing rows are all zeros. With `targets_length=None` the decoder's side is left out.
    """

    # Decoder inputs and weights are as SeqIO's EncDecFeatureConverter makes them without packing.
    def matrix(sequences, length):
        out = np.zeros((batch_size, length), np.int32)
        for i, ids in enumerate(sequences):
            # SeqIO trims a target that is too long in the same way.
            ids = ids[:length]
            out[i, : len(ids)] = ids
        return out

    batch = {"encoder_input_tokens": matrix([r.input_ids for r in rows], inputs_length)}
    if targets_length is not None:
        targets = matrix([r.target_ids or () for r in rows], targets_length)
        batch["decoder_target_tokens"] = targets
        # Teacher forcing: at each position the decoder reads the target before it, at first PAD.
        batch["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        batch["decoder_loss_weights"] = (targets > 0).astype(np.int32)
    return batch


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Return `array` with rows of zeros added up to `rows` rows."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield consecutive lists of `size` items; the last may be shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def abstract_batch(config: DatasetConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a whole training batch, known before any data is read."""
    # Known without data, so that compilation overlaps with the reader's start.
    # Rows of one example each have no segments to keep apart.
    names = FEATURES if config.pack else [n for n in FEATURES if "segment" not in n]
    sides = {"encoder": "inputs", "decoder": "targets"}
    return {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, config.task_feature_lengths[sides[name.split("_")[0]]]), np.int32
        )
        for name in names
    }


def process_shard() -> dict[str, int]:
    """Return this process's share of the rows, as keyword arguments of `train_batches`."""
    return {"shard": jax.process_index(), "num_shards": jax.process_count()}
