"""SeqIO tasks: everything that needs TensorFlow, for the reader process and the workers of `cache`.

The training process never calls these functions. It asks `cosmo.engine.data.reader`, which runs
them in a process of their own, because importing SeqIO is unsafe beside JAX: TensorFlow Datasets
and Grain replace `builtins.__import__` for the whole process while they load, and an import that
JAX does meanwhile in another thread fails.
"""

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.data.datasets import FEATURES, DatasetConfig, HostBatch, Row, pad_rows


def import_seqio():
    """Return the seqio module, with TensorFlow kept off the accelerators: JAX needs their memory.

    Raises UserError where the extra `seqio` is not installed.
    """
    if "seqio" not in sys.modules:
        with _without_device_notes():
            try:
                import seqio
                import tensorflow as tf
            except ImportError as error:
                raise UserError(
                    f"reading a SeqIO task needs the extra `seqio` ({error}): "
                    "pip install 'cosmo-dialogue[seqio]', or in a clone pip install -e '.[seqio]'"
                ) from error
            tf.config.set_visible_devices([], "GPU")
            tf.constant(0)  # start the runtime here, where its notes are filtered
    import seqio

    return seqio


# The lines that TensorFlow's C++ prints about GPUs and oneDNN.
_DEVICE_NOTE = re.compile(
    r"^WARNING: All log messages before absl::InitializeLog"
    r"|^[IWE]\d{4} .*(oneDNN|cuda|cuInit|TensorRT|cpu_feature_guard)"
)


@contextlib.contextmanager
def _without_device_notes() -> Iterator[None]:
    """Filter TensorFlow's device notes out of standard error while it loads.

    TensorFlow writes them to file descriptor 2 before any log level applies.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines(keepends=True):
                if not _DEVICE_NOTE.search(line):
                    sys.stderr.write(line)


class plain_errors:  # noqa: N801
    """Context manager that turns TensorFlow's report of an error in a Python reader into one line.

    TensorFlow wraps the error of a Python generator in its own, with the traceback as text.
    """

    _SOURCE = re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception)): (.+?)(?:\nTraceback|\n\n|$)", re.S)

    def __init__(self, name: str, split: str):
        self.what = f"{name!r}, split {split!r}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, UserError | GeneratorExit):
            return False
        if isinstance(error, AssertionError) and "task cache directories" in str(error):
            raise UserError(
                f"reading {self.what}: {error} Write it with seqio_cache_tasks and name its folder "
                "(see docs/extend.md), or leave out --gin.USE_CACHED_TASKS"
            ) from error
        if type(error).__module__.startswith("tensorflow"):
            found = self._SOURCE.search(getattr(error, "message", str(error)))
            if found:
                raise UserError(f"reading {self.what}: {found.group(2).strip()}") from error
        return False


def resolve_name(config: DatasetConfig) -> str:
    """Import the module that registers the task, and return the task's name.

    Raises UserError, with the nearest name, for a module or a task that does not exist.
    """
    seqio = import_seqio()
    if config.module:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise UserError(
                f"cannot import {config.module}: {error}", setting="MIXTURE_OR_TASK_MODULE"
            ) from error
    name = config.mixture_or_task_name
    name = name() if callable(name) else name
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (registered: {sorted(known)})"
        raise UserError(f"no SeqIO task or mixture {name!r}{hint}", setting="MIXTURE_OR_TASK_NAME")
    return name


def subtasks(config: DatasetConfig):
    """Return (task, the seqio module) for each task of the mixture that has the split.

    Raises UserError if no task has it.
    """
    seqio = import_seqio()
    name = resolve_name(config)
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    found = [(task, seqio) for task in tasks if config.split in task.splits]
    if not found:
        splits = sorted({split for task in tasks for split in task.splits})
        raise UserError(f"no task of {name!r} has a split {config.split!r}; there are {splits}")
    return found


def check_split(config: DatasetConfig) -> None:
    """Raise UserError, before any data is read, if no task has the split that is wanted."""
    subtasks(config)


def train_batches(
    config: DatasetConfig, start_step: int = 0, shard: int = 0, num_shards: int = 1
) -> Iterator[HostBatch]:
    """Yield endless packed batches of this shard's rows, int32, with SeqIO's feature names.

    The order is a function of (seed, start_step). A run that is resumed at another step reads the
    corpus in another order, because it would else read the beginning again.
    """
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
            yield _as_int32(batch)


def eval_batches(
    config: DatasetConfig, num_batches: int | None = None, shard: int = 0, num_shards: int = 1
) -> dict[str, list[HostBatch]]:
    """Return {task: one epoch (or `num_batches`) of packed batches}; empty rows fill the last one.

    Task by task, because a mixture's rates are a way to train, not to measure. Every process reads
    every row and keeps its share of each batch, so that all processes have equally many batches.
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


class TaskExamples(NamedTuple):
    """A SeqIO task, its examples as SeqIO gives them, and the same as rows."""

    task: Any
    examples: list[Mapping[str, Any]]
    rows: list[Row]


def task_examples(config: DatasetConfig, num_examples: int | None = None) -> list[TaskExamples]:
    """Return every task of the mixture that has the split, with its examples in memory.

    `num_examples` limits each task (None: all). Raises UserError for a task without examples.
    """
    lengths = dict(config.task_feature_lengths)
    found = []
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
        found.append(TaskExamples(task, examples, rows))
    return found


def measure(
    found: TaskExamples,
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
    counts: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Return {metric: value} by the task's own metric functions.

    `predictions` are texts and `scores` log-likelihoods (nats), one an example in order; None
    leaves out the metrics that need them. `counts` (num_tokens, num_correct) are an example's.
    """
    task = found.task

    def postprocess(text: str, example: Any, *, is_target: bool) -> Any:
        if task.postprocess_fn is None:
            return text
        return task.postprocess_fn(text, example=example, is_target=is_target)

    pairs = list(zip(found.rows, found.examples, strict=True))
    targets = [postprocess(row.targets, example, is_target=True) for row, example in pairs]
    values: dict[str, Any] = {}
    for metric in task.score_metric_fns if scores is not None else ():
        # SeqIO's metric has two parameters. A third one of ours takes the numbers of tokens.
        counted = len(inspect.signature(metric).parameters) > 2
        values.update(metric(targets, list(scores), *([counts] if counted else [])))
    if predictions is not None and task.predict_metric_fns:
        answers = [
            postprocess(text, example, is_target=False)
            for text, (_, example) in zip(predictions, pairs, strict=True)
        ]
        for metric in task.predict_metric_fns:
            values.update(metric(targets, answers))
    return {name: float(np.asarray(value)) for name, value in values.items()}


def _as_int32(batch: Mapping[str, Any]) -> HostBatch:
    """Return the features that a model reads (T5 does not use positions), as int32."""
    return {name: np.asarray(batch[name]).astype(np.int32) for name in FEATURES if name in batch}


def _row(index: int, example: Mapping[str, Any], features, lengths) -> Row:
    """Return a Row of a SeqIO example; text that the task did not keep is decoded from tokens."""

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


class Requests:
    """The functions that a reader process answers, with the streams and tasks that it holds open.

    `reader.Reader` calls each public method by its name; arguments and results are pickled.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Iterator[HostBatch]] = {}
        self._tasks: dict[int, TaskExamples] = {}

    def load(self) -> None:
        """Import SeqIO now, while the training process compiles."""
        import_seqio()

    def check_split(self, config: DatasetConfig) -> None:
        """See `check_split`."""
        check_split(config)

    def open_stream(self, number: int, *args: Any) -> None:
        """Open `train_batches(*args)` as stream `number`."""
        self._streams[number] = train_batches(*args)

    def next_batch(self, number: int) -> HostBatch:
        """Return the next batch of stream `number`."""
        return next(self._streams[number])

    def close_stream(self, number: int) -> None:
        """Close stream `number` and free its buffers."""
        self._streams.pop(number).close()

    def eval_batches(self, *args: Any) -> dict[str, list[HostBatch]]:
        """See `eval_batches`."""
        return eval_batches(*args)

    def open_tasks(
        self, first_number: int, config: DatasetConfig, num_examples: int | None
    ) -> list[tuple[int, str, list[Row], bool, bool]]:
        """Return (number, name, rows, has predict metrics, has score metrics) of each task."""
        opened = []
        for number, found in enumerate(task_examples(config, num_examples), first_number):
            self._tasks[number] = found
            task = found.task
            kinds = bool(task.predict_metric_fns), bool(task.score_metric_fns)
            opened.append((number, task.name, found.rows, *kinds))
        return opened

    def measure(self, number: int, *args: Any) -> dict[str, float]:
        """See `measure`, of task `number`."""
        return measure(self._tasks[number], *args)
