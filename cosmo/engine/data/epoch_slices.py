"""Read a SeqIO mixture in slices of epochs. A slice's examples depend on its number alone.

An epoch reads every example of every task at least once. The task with the lowest rate for its size
is read once, the others more often, as the rates ask. Slice s of S takes every S-th example of each
task, from the s-th on. It draws and shuffles by a seed of its own. A cache's files are therefore
the same for any number of processes and after any kill.
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

# Rates within 2% of the tasks' sizes mean every example once, because published rates are rounded
# sizes: Cosmo's paper trained on the concatenation of its corpora.
RATE_TOLERANCE = 0.02
# Examples that TensorFlow hands over at once: each handing over costs more than an example.
BATCH_EXAMPLES = 256
SIDES = ("inputs", "targets")
GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, are spread evenly over [0, 1)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slice `index` of `count` of an epoch, by the cache's seed; `processes` read at once."""

    epoch: int
    index: int
    count: int
    seed: int
    processes: int = 1

    @property
    def draws(self) -> int:
        """Return the seed that the slice drops, shuffles and mixes by."""
        return epoch_seed(self.seed, self.epoch, self.index)


def epoch_seed(seed: int, epoch: int, index: int | None = None) -> int:
    """Return SeqIO's seed for an epoch's sources, or for one of its slices; 31 bits."""
    text = f"{seed}/{epoch}" + ("" if index is None else f"/{index}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def task_rates(config: datasets.DatasetConfig) -> dict[str, float]:
    """Return the rate of each task that has the split and a rate above 0; 1 of a single task."""
    seqio = import_seqio()
    mixture = seqio.get_mixture_or_task(seqio_reader.resolve_name(config))
    found = {
        task.name: float(mixture.get_rate(task)) if hasattr(mixture, "get_rate") else 1.0
        for task in seqio_reader.subtasks(config)
    }
    for name, rate in found.items():
        if not rate:
            log.info("task %s has rate 0 and is left out", name)
    return {name: rate for name, rate in found.items() if rate}


def count_examples(config: datasets.DatasetConfig, name: str) -> int:
    """Return the number of examples in a task's source."""
    _, source = _source(config, name)
    with plain_errors(name, config.split):
        # Our own sources count lines, without TensorFlow around every example.
        if hasattr(source, "count"):
            return source.count(config.split)
        known = source.num_input_examples(config.split)
        if known is not None:
            return known
        dataset = source.get_dataset(split=config.split, shuffle=False, seed=0)
        return int(dataset.reduce(np.int64(0), lambda n, _: n + 1))


def times_an_epoch(wanted: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    """Return how often an epoch reads each example of each task, at least 1."""
    # SeqIO's own epoch of a mixture ends with the first task that ends, and leaves out the rest of
    # the others. Here the task with the lowest rate for its size is read once, and no example is
    # left out.
    shares = {name: wanted[name] / sizes[name] for name in wanted}
    least = min(shares.values())
    times = {name: share / least for name, share in shares.items()}
    return {name: 1.0 if n <= 1 + RATE_TOLERANCE else n for name, n in times.items()}


def is_extra(k: Any, epoch: int, fraction: float, floor: Any = np.floor) -> Any:
    """Return whether an epoch reads example `k` (float64) once more, for a fraction of examples.

    The turns go round: n epochs read an example n * fraction times, plus or minus one.
    """
    place = k * GOLDEN_RATIO - floor(k * GOLDEN_RATIO)
    return floor((epoch + 1) * fraction + place) > floor(epoch * fraction + place)


def read_slice(
    config: datasets.DatasetConfig, plan: Mapping[str, Any], part: Slice, limit: int | None = None
) -> Iterator[tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]], list[str]]]:
    """Yield a slice's examples in batches of (task, sides, ids), in their order.

    Args:
        config: the mixture.
        plan: {task: {"examples": in an epoch before repetition, "times": read in an epoch}}.
        part: the slice.
        limit: the most examples read of each task's source.

    `task` int [B] numbers the keys of `plan`. `sides` {"inputs", "targets"} are (tokens int [N] of
    all examples, tokens an example int [B]). An id is empty where the task keeps none.
    """
    seqio = import_seqio()
    import tensorflow as tf

    tasks = []
    for number, (name, entry) in enumerate(plan.items()):
        task, source = _source(config, name)
        sliced = task.replace(
            source=seqio.FunctionDataSource(
                functools.partial(_read_source, source, part, entry["times"], limit),
                splits=(config.split,),
            ),
            preprocessors=[*_preprocessors(config, task), functools.partial(_tag, number)],
        )
        tasks.append((sliced, entry["examples"] * entry["times"]))
    # A task that ends must not end the others, as it does in SeqIO's own mixtures.
    sample = functools.partial(tf.data.Dataset.sample_from_datasets, stop_on_empty_dataset=False)
    mixture = seqio.Mixture("cache", tasks, sample_fn=sample)
    options = tf.data.Options()
    options.deterministic = True  # else the bytes of a cache would depend on the machine's load
    # The processes share the cores. TensorFlow would start a thread a core in each.
    options.threading.private_threadpool_size = max(2, (os.cpu_count() or 2) // part.processes)
    with plain_errors(" and ".join(plan), config.split):
        dataset = mixture.get_dataset(
            dict(config.task_feature_lengths),
            config.split,
            shuffle=config.shuffle,
            seed=part.draws,
            num_epochs=1,
            passthrough_features=["task", "id"],
            try_in_mem_cache=False,  # each slice is read once
        )
        batches = dataset.ragged_batch(BATCH_EXAMPLES).map(_flat).prefetch(4).with_options(options)
        for task, sides, names in batches.as_numpy_iterator():
            yield task, sides, [name.decode() for name in names.tolist()]


def _flat(batch):
    """Return a batch of ragged sides as (task, {side: (tokens, tokens an example)}, ids)."""
    sides = {side: (batch[side].values, batch[side].row_lengths()) for side in SIDES}
    return batch["task"], sides, batch["id"]


def _source(config: datasets.DatasetConfig, name: str):
    """Return (task, the source of its examples): its own, or SeqIO's cache of it."""
    task = import_seqio().TaskRegistry.get(name)
    if config.use_cached and task.supports_caching:
        if not task.cache_dir:
            raise UserError(
                f"task {name!r} is not in SeqIO's cache: write it with seqio_cache_tasks, and name "
                "its folder (see docs/extend.md), or read the task itself",
                setting="USE_CACHED_TASKS",
            )
        return task, task._get_cached_source(config.split)
    return task, task.source


def _preprocessors(config: datasets.DatasetConfig, task) -> list[Any]:
    """Return the preprocessors that SeqIO's cache has not applied to a task's source."""
    import seqio

    steps = list(task.preprocessors)
    places = [i for i, step in enumerate(steps) if isinstance(step, seqio.CacheDatasetPlaceholder)]
    if places and config.use_cached:
        return steps[places[0] + 1 :]
    return [step for i, step in enumerate(steps) if i not in places]


def _read_source(
    source, part: Slice, times: float, limit: int | None, split, shuffle_files=False, seed=None
):
    """Return a slice of a source's examples, each as often as an epoch reads it."""
    # Without a shuffle and by the epoch's seed: all slices must see the source in one order.
    del shuffle_files, seed
    import seqio
    import tensorflow as tf

    settings = {"split": split, "shuffle": False, "seed": epoch_seed(part.seed, part.epoch)}
    if part.count == 1:
        dataset = source.get_dataset(**settings)
    elif source.supports_arbitrary_sharding or len(source.list_shards(split)) >= part.count:
        # The source reads its own share, where `shard` reads all and drops most.
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

    # The shuffle that follows in SeqIO mixes the repeated examples with the others.
    some = dataset.enumerate().filter(extra).map(lambda k, example: example)
    return dataset.repeat(whole).concatenate(some)


def _tag(number: int, dataset):
    """Return the examples' tokens with the number of their task, and with their id or ""."""
    import tensorflow as tf

    def tag(example):
        name = example.get("id", "")
        name = name if isinstance(name, str) or name.dtype == tf.string else tf.as_string(name)
        kept = {side: example[side] for side in SIDES}
        return {**kept, "task": tf.constant(number, tf.int64), "id": tf.reshape(name, [])}

    return dataset.map(tag, num_parallel_calls=tf.data.AUTOTUNE)
