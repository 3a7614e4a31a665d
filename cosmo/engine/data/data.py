"""Batches: packed ones for training, from SeqIO; one example a row for evaluation and inference.

SeqIO and TensorFlow are imported where a SeqIO task is read and nowhere else, so inference on plain
records never loads them.
"""

import dataclasses
import difflib
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import rows
from cosmo.engine.data.seqio_bridge import import_seqio, plain_errors

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
    """Which examples, in what shape. Field names are T5X's `utils.DatasetConfig`'s.

    `mixture_or_task_name` is a name in SeqIO's registry, or a function that returns one (it may
    register tasks first; it is called only when the data is read). `module` is imported first.
    `cache_path`: training reads the packed rows of a cache there (see `rows`) instead of SeqIO.
    """

    mixture_or_task_name: str | Callable[[], str]
    task_feature_lengths: Mapping[str, int]
    split: str = "train"
    batch_size: int = 128
    shuffle: bool = True
    seed: int | None = 0
    use_cached: bool = False
    pack: bool = True
    module: str | None = None
    cache_path: str | None = None

    def __post_init__(self):
        check_lengths(self.task_feature_lengths)


class TrainBatch(NamedTuple):
    """A training batch: this process's rows, and where reading stands after it.

    `position` is JSON that `train_batches` takes to go on behind this batch, and the same on every
    process; None where the source has none. `rows` names the rows of the whole batch, all
    processes', in their source; None where they have no names.
    """

    arrays: HostBatch
    position: Any = None
    rows: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of its own: text as people read it, and the tokens that a model reads."""

    id: str
    inputs: str
    input_ids: tuple[int, ...]
    targets: str | None = None
    target_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A SeqIO task's examples with the functions that judge answers to them."""

    name: str
    rows: list[Row]
    predict_metric_fns: tuple[Callable, ...] = ()
    score_metric_fns: tuple[Callable, ...] = ()
    postprocess: Callable[[str, Row], Any] = lambda text, row: text


def check_lengths(lengths: Any) -> None:
    """Raise UserError unless `lengths` gives tokens of both features."""
    if not isinstance(lengths, Mapping) or not {"inputs", "targets"} <= set(lengths):
        raise UserError(
            f"task_feature_lengths={lengths!r}; give tokens of both features, such as "
            "{'inputs': 512, 'targets': 128} (gin: TASK_FEATURE_LENGTHS)"
        )


def resolve_name(config: DatasetConfig) -> str:
    """Import what registers the task, and return its name. Loads SeqIO."""
    seqio = import_seqio()
    if config.module:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise UserError(
                f"cannot import {config.module}: {error} (gin: MIXTURE_OR_TASK_MODULE)"
            ) from error
    name = config.mixture_or_task_name
    name = name() if callable(name) else name
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (registered: {sorted(known)})"
        raise UserError(f"no SeqIO task or mixture {name!r}{hint} (gin: MIXTURE_OR_TASK_NAME)")
    return name


def train_batches(
    config: DatasetConfig,
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    position: Any = None,
    shard: int = 0,
    num_shards: int = 1,
) -> Iterator[TrainBatch]:
    """Endless packed batches of this shard's rows, int32, with SeqIO's feature names.

    Reading goes on at `position`, which came with an earlier batch. Live SeqIO has none: there the
    order is a function of (seed, start_step), so that a run resumed at another step reads the
    corpus in another order rather than reading its beginning again. `num_steps`, the batches that
    will be wanted, is only for the log.
    """
    if config.cache_path is not None:
        where = {"position": position, "shard": shard, "num_shards": num_shards}
        yield from itertools.starmap(TrainBatch, rows.batches(config, num_steps=num_steps, **where))
    seqio = import_seqio()
    name = resolve_name(config)
    seed = None if config.seed is None else (config.seed * 1_000_003 + start_step) % 2**31
    with plain_errors(name, config.split):
        dataset = seqio.get_dataset(
            name,
            dict(config.task_feature_lengths),
            seqio.EncDecFeatureConverter(pack=config.pack),
            dataset_split=config.split,
            use_cached=config.use_cached,
            shuffle=config.shuffle,
            num_epochs=None,
            shard_info=seqio.ShardInfo(index=shard, num_shards=num_shards),
            seed=seed,
            verbose=False,
        )
        dataset = dataset.batch(config.batch_size // num_shards, drop_remainder=True)
        for batch in dataset.prefetch(4).as_numpy_iterator():
            yield TrainBatch(_as_int32(batch))


def eval_batches(
    config: DatasetConfig, *, num_batches: int | None = None, shard: int = 0, num_shards: int = 1
) -> dict[str, list[HostBatch]]:
    """{task: one epoch (or `num_batches`) of packed batches}; the last is filled with empty rows.

    Task by task, because a mixture's rates are a way to train, not to measure. Every process reads
    every row and keeps its share of each batch, so that all have equally many.
    """
    share = config.batch_size // num_shards
    batches = {}
    for task, seqio in subtasks(config):
        with plain_errors(task.name, config.split):
            dataset = seqio.get_dataset(
                task.name,
                dict(config.task_feature_lengths),
                seqio.EncDecFeatureConverter(pack=config.pack),
                dataset_split=config.split,
                use_cached=config.use_cached,
                shuffle=False,
                num_epochs=1,
                seed=config.seed,
                verbose=False,
            ).batch(config.batch_size)
            if num_batches is not None:
                dataset = dataset.take(num_batches)
            whole = [_as_int32(batch) for batch in dataset.as_numpy_iterator()]
        batches[task.name] = [
            {
                name: pad_rows(rows, config.batch_size)[shard * share : (shard + 1) * share]
                for name, rows in batch.items()
            }
            for batch in whole
        ]
    return batches


def check_split(config: DatasetConfig) -> None:
    """Raise UserError, before any data is read, if no task has the split that is wanted."""
    subtasks(config)


def eval_tasks(config: DatasetConfig, num_examples: int | None = None) -> list[EvalTask]:
    """Every task of the mixture that has the split and metrics, with its rows in memory."""
    lengths = dict(config.task_feature_lengths)
    tasks = []
    for task, _ in subtasks(config):
        with plain_errors(task.name, config.split):
            dataset = task.get_dataset(
                sequence_length=lengths,
                split=config.split,
                use_cached=config.use_cached,
                shuffle=False,
                seed=config.seed,
            )
            if num_examples is not None:
                dataset = dataset.take(num_examples)
            examples = list(dataset.as_numpy_iterator())
        if not examples:
            raise UserError(f"task {task.name!r} has no examples in split {config.split!r}")
        features = task.output_features
        rows = [_row(i, example, features, lengths) for i, example in enumerate(examples)]
        by_row = dict(zip((row.id for row in rows), examples, strict=True))

        def postprocess(text, row, *, is_target, task=task, by_row=by_row):
            return task.postprocess_fn(text, example=by_row[row.id], is_target=is_target)

        tasks.append(
            EvalTask(
                task.name,
                rows,
                tuple(task.predict_metric_fns),
                tuple(task.score_metric_fns),
                postprocess if task.postprocess_fn else lambda text, row, *, is_target: text,
            )
        )
    return tasks


def subtasks(config: DatasetConfig):
    """(task, the seqio module) for each task of the mixture that has the split."""
    seqio = import_seqio()
    name = resolve_name(config)
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    found = [(task, seqio) for task in tasks if config.split in task.splits]
    if not found:
        splits = sorted({split for task in tasks for split in task.splits})
        raise UserError(f"no task of {name!r} has a split {config.split!r}; there are {splits}")
    return found


def make_batch(
    rows: list[Row], batch_size: int, inputs_length: int, targets_length: int | None
) -> HostBatch:
    """Rows one by one, padded with zeros to [batch_size, length]; missing rows are all zeros.

    `targets_length=None` leaves the decoder's side out (generation).
    """

    def matrix(sequences, length):
        out = np.zeros((batch_size, length), np.int32)
        for i, ids in enumerate(sequences):
            ids = ids[:length]
            out[i, : len(ids)] = ids
        return out

    batch = {"encoder_input_tokens": matrix([r.input_ids for r in rows], inputs_length)}
    if targets_length is not None:
        targets = matrix([r.target_ids or () for r in rows], targets_length)
        batch["decoder_target_tokens"] = targets
        batch["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        batch["decoder_loss_weights"] = (targets > 0).astype(np.int32)
    return batch


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """`array` with zero rows added up to `rows`."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def abstract_batch(config: DatasetConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a whole training batch, known before any data is read."""
    names = FEATURES if config.pack else [n for n in FEATURES if "segment" not in n]
    sides = {"encoder": "inputs", "decoder": "targets"}
    return {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, config.task_feature_lengths[sides[name.split("_")[0]]]), np.int32
        )
        for name in names
    }


def _as_int32(batch: Mapping[str, Any]) -> HostBatch:
    """The features that a model reads (T5 has no use for positions), as int32."""
    return {name: np.asarray(batch[name]).astype(np.int32) for name in FEATURES if name in batch}


def _row(index: int, example: Mapping[str, Any], features, lengths) -> Row:
    """A Row from a SeqIO example; text that the task did not keep is decoded from its tokens."""

    def ids(name):
        return tuple(int(i) for i in example[name][: lengths[name]])

    def text(name):
        kept = example.get(f"{name}_pretokenized")
        if kept is not None and np.ndim(kept) == 0:
            return bytes(kept).decode("utf-8") if isinstance(kept, bytes) else str(kept)
        return features[name].vocabulary.decode(list(ids(name)))

    name = example.get("id", str(index))
    name = name.decode("utf-8") if isinstance(name, bytes) else str(name)
    return Row(name, text("inputs"), ids("inputs"), text("targets"), ids("targets"))


def process_shard() -> dict[str, int]:
    """This process's share of the rows: keyword arguments for `train_batches`."""
    return {"shard": jax.process_index(), "num_shards": jax.process_count()}
