"""A SeqIO mixture cut into slices that can be read apart, each the same whoever reads it.

An epoch of a mixture reads every example of every task once, or more often where the rates ask for
more of one task than the others: the task that they ask least of, for its size, is read once. Slice
s of S takes every S-th example of each task, starting with the s-th; it draws and shuffles by a
seed of its own.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets, seqio_reader
from cosmo.engine.data.seqio_reader import import_seqio, plain_errors

log = logging.getLogger(__name__)

ALIKE = 0.02  # rates so near to the tasks' sizes mean: every example once
BATCH = 256  # examples handed over at once: the crossing from TensorFlow is what costs
PROBE = 1000  # examples of a task that are looked at before the work begins
MANY = 10  # times that a task is read in an epoch, from which on a mistake is likely
SIDES = ("inputs", "targets")
GOLDEN = 0.6180339887498949  # multiples of it lie evenly over [0, 1)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slice `index` of `count` of epoch `epoch`, by the cache's seed; `processes` read at once."""

    epoch: int
    index: int
    count: int
    seed: int
    processes: int = 1

    @property
    def draws(self) -> int:
        """The seed of what the slice draws: what is dropped, shuffled and mixed."""
        return epoch_seed(self.seed, self.epoch, self.index)


def epoch_seed(seed: int, epoch: int, index: int | None = None) -> int:
    """SeqIO's seed for an epoch's sources, or for one of its slices; 31 bits."""
    text = f"{seed}/{epoch}" + ("" if index is None else f"/{index}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def rates(config: datasets.DatasetConfig) -> dict[str, float]:
    """The rate of each task that has the split and takes part; of a single task 1."""
    seqio = import_seqio()
    mixture = seqio.get_mixture_or_task(seqio_reader.resolve_name(config))
    found = {
        task.name: float(mixture.get_rate(task)) if hasattr(mixture, "get_rate") else 1.0
        for task, _ in seqio_reader.subtasks(config)
    }
    for name, rate in found.items():
        if not rate:
            log.info("task %s has rate 0 and is left out", name)
    return {name: rate for name, rate in found.items() if rate}


def count(config: datasets.DatasetConfig, name: str) -> int:
    """Examples in a task's source."""
    _, source = _source(config, name)
    with plain_errors(name, config.split):
        if hasattr(source, "count"):  # ours, without TensorFlow around every example
            return source.count(config.split)
        known = source.num_input_examples(config.split)
        if known is not None:
            return known
        dataset = source.get_dataset(split=config.split, shuffle=False, seed=0)
        return int(dataset.reduce(np.int64(0), lambda n, _: n + 1))


def times_an_epoch(wanted: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    """How often an epoch reads each example of a task, from 1, by rates and sizes."""
    shares = {name: wanted[name] / sizes[name] for name in wanted}
    least = min(shares.values())
    times = {name: share / least for name, share in shares.items()}
    return {name: 1.0 if n <= 1 + ALIKE else n for name, n in times.items()}


def is_extra(k: Any, epoch: int, fraction: float, floor: Any = np.floor) -> Any:
    """Whether epoch `epoch` reads example `k` (float64) once more, for a fraction of all examples.

    Over the epochs everyone has its turn: n epochs take an example n * fraction times, give or
    take one.
    """
    place = k * GOLDEN - floor(k * GOLDEN)
    return floor((epoch + 1) * fraction + place) > floor(epoch * fraction + place)


def read(
    config: datasets.DatasetConfig, plan: Mapping[str, Any], part: Slice, limit: int | None = None
) -> Iterator[tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]], list[str]]]:
    """Batches of a slice's examples, in their order, as (task, sides, names).

    `plan` is {task: {"examples": in its source, "times": read in an epoch}}; `task` int [B] counts
    its keys; sides {"inputs", "targets"} are (tokens int [N], tokens an example int [B]); names are
    the examples' ids, empty where the task keeps none. `limit`: of each task, so many source
    examples.
    """
    seqio = import_seqio()
    import tensorflow as tf

    tasks = []
    for number, (name, entry) in enumerate(plan.items()):
        task, source = _source(config, name)
        tasks.append(
            (
                task.replace(
                    source=seqio.FunctionDataSource(
                        functools.partial(_sliced, source, part, entry["times"], limit),
                        splits=(config.split,),
                    ),
                    preprocessors=[*_remaining(config, task), functools.partial(_tag, number)],
                ),
                entry["examples"] * entry["times"],
            )
        )
    mixture = seqio.Mixture(
        "cache",
        tasks,
        sample_fn=functools.partial(
            tf.data.Dataset.sample_from_datasets, stop_on_empty_dataset=False
        ),
    )
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = max(2, (os.cpu_count() or 2) // part.processes)
    with plain_errors(" and ".join(plan), config.split):
        dataset = mixture.get_dataset(
            dict(config.task_feature_lengths),
            config.split,
            shuffle=config.shuffle,
            seed=part.draws,
            num_epochs=1,
            passthrough_features=["task", "id"],
            try_in_mem_cache=False,
        )
        batches = dataset.ragged_batch(BATCH).map(_flat).prefetch(4).with_options(options)
        for task, sides, names in batches.as_numpy_iterator():
            yield task, sides, [name.decode() for name in names.tolist()]


def _flat(batch):
    """A batch of ragged sides as (task, {side: (tokens, tokens an example)}, names)."""
    sides = {side: (batch[side].values, batch[side].row_lengths()) for side in SIDES}
    return batch["task"], sides, batch["id"]


def _source(config: datasets.DatasetConfig, name: str):
    """(task, where its examples come from): its source, or SeqIO's cache of it."""
    task = import_seqio().TaskRegistry.get(name)
    if config.use_cached and task.supports_caching:
        if not task.cache_dir:
            raise UserError(
                f"task {name!r} is not in SeqIO's cache: write it with seqio_cache_tasks, and name "
                "its folder (see docs/extend.md), or leave out --gin.USE_CACHED_TASKS"
            )
        return task, task._get_cached_source(config.split)
    return task, task.source


def _remaining(config: datasets.DatasetConfig, task) -> list[Any]:
    """The preprocessors that a task's source has not been through."""
    import seqio

    steps = list(task.preprocessors)
    places = [i for i, step in enumerate(steps) if isinstance(step, seqio.CacheDatasetPlaceholder)]
    if places and config.use_cached:
        return steps[places[0] + 1 :]
    return [step for i, step in enumerate(steps) if i not in places]


def _sliced(
    source, part: Slice, times: float, limit: int | None, split, shuffle_files=False, seed=None
):
    """A slice of a source's examples, each as often as the epoch wants it."""
    del shuffle_files, seed  # the slice's; all slices must see the source in one order
    import seqio
    import tensorflow as tf

    settings = {"split": split, "shuffle": False, "seed": epoch_seed(part.seed, part.epoch)}
    if part.count == 1:
        dataset = source.get_dataset(**settings)
    elif source.supports_arbitrary_sharding or len(source.list_shards(split)) >= part.count:
        info = seqio.ShardInfo(index=part.index, num_shards=part.count)
        dataset = source.get_dataset(**settings, shard_info=info)
    else:
        dataset = source.get_dataset(**settings).shard(part.count, part.index)
    if limit is not None:
        return dataset.take(limit)
    whole, fraction = int(times), times - int(times)
    if not fraction:
        return dataset.repeat(whole)

    def extra(k, example):
        del example
        k = tf.cast(k * part.count + part.index, tf.float64)
        return is_extra(k, part.epoch, fraction, tf.floor)

    some = dataset.enumerate().filter(extra).map(lambda k, example: example)
    return dataset.repeat(whole).concatenate(some)


def _tag(number: int, dataset):
    """The examples' tokens, with the number of their task and their id, if they have one."""
    import tensorflow as tf

    def tag(example):
        name = example.get("id", "")
        name = name if isinstance(name, str) or name.dtype == tf.string else tf.as_string(name)
        kept = {side: example[side] for side in SIDES}
        return {**kept, "task": tf.constant(number, tf.int64), "id": tf.reshape(name, [])}

    return dataset.map(tag, num_parallel_calls=tf.data.AUTOTUNE)
