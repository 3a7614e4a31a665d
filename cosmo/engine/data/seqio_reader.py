"""Read SeqIO tasks with TensorFlow, in the reader process and in the workers of `cache`.

The training process never calls these functions. It asks `cosmo.engine.data.reader`, which calls
them in a process of their own.
"""

# Importing SeqIO is unsafe beside JAX. TensorFlow Datasets and Grain replace `builtins.__import__`
# for the whole process while they load. An import that JAX does meanwhile in another thread fails.

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

    Raises UserError if the extra `seqio` is not installed.
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
            tf.constant(0)  # starts the runtime here, where its notes are filtered
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
    # A descriptor, because C++ does not write through sys.stderr.
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


# The first line of a Python error inside TensorFlow's report.
_PYTHON_ERROR = re.compile(
    r"(?:^|\s)[\w.]*(?:Error|Exception): (.+?)(?:\nTraceback|\n\n|$)", re.DOTALL
)


@contextlib.contextmanager
def plain_errors(name: str, split: str) -> Iterator[None]:
    """Turn TensorFlow's report of an error in a Python reader into one line, a UserError.

    TensorFlow wraps the error of a Python generator in its own, with the traceback as text.
    """
    dataset = f"{name!r}, split {split!r}"
    try:
        yield
    except UserError:
        raise
    except AssertionError as error:
        if "task cache directories" not in str(error):
            raise
        raise UserError(
            f"reading {dataset}: {error} Write it with seqio_cache_tasks and name its folder (see "
            "docs/extend.md), or read the task itself",
            setting="USE_CACHED_TASKS",
        ) from error
    except Exception as error:
        report = getattr(error, "message", str(error))
        found = _PYTHON_ERROR.search(report)
        # Only the wrapped error of a reader is a user's to correct: any other keeps its traceback.
        if not found or not type(error).__module__.startswith("tensorflow"):
            raise
        raise UserError(f"reading {dataset}: {found[1].strip()}") from error


def resolve_name(config: DatasetConfig) -> str:
    """Import the module that registers the task, and return the task's name.

    Raises UserError, with the nearest name, for a module or a task that does not exist.
    """
    seqio = import_seqio()
    # Its import registers the task, so it comes before the look-up.
    if config.module:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise UserError(
                f"cannot import {config.module}: {error}", setting="MIXTURE_OR_TASK_MODULE"
            ) from error
    name = config.mixture_or_task_name
    name = name() if callable(name) else name
    # By name, because SeqIO's own error lists every task.
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (registered: {sorted(known)})"
        raise UserError(f"no SeqIO task or mixture {name!r}{hint}", setting="MIXTURE_OR_TASK_NAME")
    return name


def subtasks(config: DatasetConfig) -> list[Any]:
    """Return the tasks of the mixture that have the split. Raises UserError if none has it."""
    seqio = import_seqio()
    name = resolve_name(config)
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    found = [task for task in tasks if config.split in task.splits]
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

    The order is a function of (seed, start_step).
    """
    seqio = import_seqio()
    name = resolve_name(config)
    # SeqIO's pipelines keep no position. A run that is resumed reads the corpus in another order,
    # because else it would read the beginning again.
    # The prime keeps pairs of neighbouring seeds and steps apart.
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
        # Full batches only: shapes are fixed when the step is compiled, and the data has no end.
        dataset = dataset.batch(config.batch_size // num_shards, drop_remainder=True)
        for batch in dataset.prefetch(4).as_numpy_iterator():
            yield _as_int32(batch)


def eval_batches(
    config: DatasetConfig, num_batches: int | None = None, shard: int = 0, num_shards: int = 1
) -> dict[str, list[HostBatch]]:
    """Return {task: one epoch, or `num_batches`, of packed batches}, with empty rows at the end."""
    # Task by task, because a mixture's rates are a way to train, not to measure. Every process
    # reads every row and keeps its share of each batch, so that all have equally many batches.
    seqio, share = import_seqio(), config.batch_size // num_shards
    batches = {}
    for task in subtasks(config):
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
            # Kept in memory, because every evaluation of a run measures the same batches.
            whole = [_as_int32(batch) for batch in dataset.as_numpy_iterator()]
        batches[task.name] = [
            {
                # The last batch gets the compiled shape; rows of zeros weigh nothing.
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

    `num_examples` limits each task; None is all. Raises UserError for a task without examples.
    """
    lengths = dict(config.task_feature_lengths)
    found = []
    for task in subtasks(config):
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
            # All in memory: the metric functions take the whole split at once.
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

    Args:
        found: the task with its examples.
        predictions: a text for each example; None leaves out the metrics of predictions.
        scores: a log-likelihood (nats) for each example; None leaves out the metrics of scores.
        counts: num_tokens and num_correct of each example.
    """
    task = found.task

    def postprocess(text: str, example: Any, *, is_target: bool) -> Any:
        # SeqIO allows a task without one.
        if task.postprocess_fn is None:
            return text
        return task.postprocess_fn(text, example=example, is_target=is_target)

    pairs = list(zip(found.rows, found.examples, strict=True))
    targets = [postprocess(row.targets, example, is_target=True) for row, example in pairs]
    values: dict[str, Any] = {}
    for metric in task.score_metric_fns if scores is not None else ():
        # SeqIO's metrics have two parameters. Ours may take the counts of tokens as a third.
        counted = len(inspect.signature(metric).parameters) > 2
        values.update(metric(targets, list(scores), *([counts] if counted else [])))
    if predictions is not None and task.predict_metric_fns:
        answers = [
            postprocess(text, example, is_target=False)
            for text, (_, example) in zip(predictions, pairs, strict=True)
        ]
        for metric in task.predict_metric_fns:
            values.update(metric(targets, answers))
    # Metrics may be scalars of TensorFlow, which the training process must not unpickle.
    return {name: float(np.asarray(value)) for name, value in values.items()}


def _as_int32(batch: Mapping[str, Any]) -> HostBatch:
    """Return the features that a model reads, as int32."""
    # Positions are left out: T5's are relative.
    return {name: np.asarray(batch[name]).astype(np.int32) for name in FEATURES if name in batch}


def _row(index: int, example: Mapping[str, Any], features, lengths) -> Row:
    """Return the Row of a SeqIO example, with text from the tokens if the task kept none.

    A task may give `prefix` (ids that begin the answer) and `num_given` (targets not to score).
    """

    def ids(name):
        return tuple(int(i) for i in example[name][: lengths[name]])

    def text(name):
        kept = example.get(f"{name}_pretokenized")
        if kept is not None and np.ndim(kept) == 0:
            return bytes(kept).decode("utf-8") if isinstance(kept, bytes) else str(kept)
        return features[name].vocabulary.decode(list(ids(name)))

    name = example.get("id", str(index))
    name = name.decode("utf-8") if isinstance(name, bytes) else str(name)
    return Row(
        name,
        text("inputs"),
        ids("inputs"),
        text("targets"),
        ids("targets"),
        prefix_ids=tuple(int(i) for i in example.get("prefix", ())),
        num_given=int(example.get("num_given", 0)),
    )


class Requests:
    """The functions that the reader process answers, with its open streams and tasks.

    `reader` calls each public method by its name. Arguments and results are pickled.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Iterator[HostBatch]] = {}
        self._tasks: list[TaskExamples] = []

    def load(self) -> None:
        """Import SeqIO now, while the training process compiles."""
        import_seqio()

    check_split = staticmethod(check_split)
    eval_batches = staticmethod(eval_batches)

    def open_stream(self, number: int, *args: Any) -> None:
        """Open `train_batches(*args)` as stream `number`."""
        self._streams[number] = train_batches(*args)

    def next_batch(self, number: int) -> HostBatch:
        """Return the next batch of stream `number`."""
        return next(self._streams[number])

    def close_stream(self, number: int) -> None:
        """Close stream `number` and free its buffers."""
        self._streams.pop(number).close()

    def open_tasks(
        self, config: DatasetConfig, num_examples: int | None
    ) -> list[tuple[int, str, list[Row], bool, bool]]:
        """Return (number, name, rows, has predict metrics, has score metrics) of each task."""
        opened = []
        for found in task_examples(config, num_examples):
            task = found.task
            kinds = bool(task.predict_metric_fns), bool(task.score_metric_fns)
            opened.append((len(self._tasks), task.name, found.rows, *kinds))
            # Kept here by number: a task's functions cannot be pickled.
            self._tasks.append(found)
        return opened

    def measure(self, number: int, *args: Any) -> dict[str, float]:
        """Return the metrics of task `number`; see `measure`."""
        return measure(self._tasks[number], *args)
