"""Read data for training and evaluation, with SeqIO and TensorFlow in a process of their own.

The reader process starts at the first call and serves training and evaluation until the training
process ends. Requests and replies go over a pipe, in order. `seqio_reader.Requests` has the
functions that it answers.
"""

# A process, because importing SeqIO is unsafe beside JAX (see `seqio_reader`). One, because its
# imports and its filling of shuffle buffers then overlap with compilation. Training batches are
# requested ahead, so that no thread of the training process reads.

import atexit
import collections
import dataclasses
import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from cosmo.engine.base import silence
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.worker_processes import set_up_worker
from cosmo.engine.data import cache_reading
from cosmo.engine.data.datasets import DatasetConfig, HostBatch, Row, TrainBatch

log = logging.getLogger(__name__)

BATCHES_AHEAD = 4  # training batches requested before they are needed
EXIT_SECONDS = 0.5  # given to the reader process to exit by itself, before it is killed


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A SeqIO task's rows. Its metric functions stay in the reader process: see `measure`."""

    name: str
    rows: list[Row]
    has_predict_metrics: bool
    has_score_metrics: bool
    number: int  # of the task, in the reader process


def train_batches(
    config: DatasetConfig,
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    position: Any = None,
    shard: int = 0,
    num_shards: int = 1,
) -> Iterator[TrainBatch]:
    """Yield endless packed batches of this shard's rows, int32, with SeqIO's feature names.

    Args:
        config: the dataset.
        start_step: with the seed, it decides the order of SeqIO, which has no position.
        num_steps: the batches that will be read, for the log.
        position: where a cache continues; it came with an earlier batch.
        shard, num_shards: this process's number and the number of all.

    SeqIO begins to read with this call, not with the first batch.
    """
    if config.cache_path is not None:
        return cache_reading.batches(config, position, num_steps, shard, num_shards)
    return _Stream(_process(), (config, start_step, shard, num_shards))


def would_wait(batches: Iterator[TrainBatch]) -> bool:
    """Return whether `next(batches)` would wait for the reader process."""
    return isinstance(batches, _Stream) and not batches.has_batch()


def check_split(config: DatasetConfig) -> None:
    """Raise UserError, before any data is read, if no task has the split that is wanted."""
    _process().call("check_split", config, doing=f"looking up the tasks of split {config.split!r}")


def eval_batches(
    config: DatasetConfig, *, num_batches: int | None = None, shard: int = 0, num_shards: int = 1
) -> dict[str, list[HostBatch]]:
    """Return {task: packed batches}; see `seqio_reader.eval_batches`."""
    doing = f"reading split {config.split!r}"
    return _process().call("eval_batches", config, num_batches, shard, num_shards, doing=doing)


def eval_tasks(config: DatasetConfig, num_examples: int | None = None) -> list[EvalTask]:
    """Return every task of the mixture that has the split, with its rows in memory."""
    doing = f"reading split {config.split!r}"
    opened = _process().call("open_tasks", config, num_examples, doing=doing)
    return [EvalTask(name, rows, *kinds, number) for number, name, rows, *kinds in opened]


def measure(
    task: EvalTask,
    predictions: Sequence[str] | None,
    scores: Sequence[float] | None,
    counts: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Return {metric: value} by the task's own functions; see `seqio_reader.measure`."""
    args = (task.number, predictions, scores, counts)
    return _process().call("measure", *args, doing=f"computing the metrics of {task.name}")


def start() -> None:
    """Start the reader process, so that its imports overlap with what the caller does next."""
    _process()


class _Reader:
    """The reader process as the training process sees it: requests out, replies in, in order."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks of JAX's threads
        self._pipe, theirs = context.Pipe()
        quiet = logging.getLogger("cosmo").getEffectiveLevel() > logging.INFO
        self._process = context.Process(
            target=_serve, args=(theirs, quiet), name="cosmo-reader", daemon=True
        )
        self._process.start()
        theirs.close()  # else the pipe would have no end of file when the process is gone
        # Futures without an executor: a call that waits reads the pipe, so no thread is needed.
        self._pending: collections.deque[Future] = collections.deque()
        self.streams = 0  # opened so far: the number of the next one
        self.closed = False
        # At exit Python would send SIGTERM, which the reader ignores, and then wait for its end.
        atexit.register(self.close)
        # Its imports begin at once, while this process does something else.
        self.request("load")

    def request(self, name: str, *args: Any) -> Future:
        """Send a small request: a pipe holds 64 KiB while the other side is busy."""
        try:
            self._pipe.send((name, args))
        except OSError:
            raise self._gone() from None
        self._pending.append(Future())
        return self._pending[-1]

    def call(self, name: str, *args: Any, doing: str) -> Any:
        """Return the reply to a request of any size. `doing` is logged while the caller waits."""
        while self._pending:  # if both sides sent at once, they would block each other for ever
            self._receive(doing)
        return self.result(self.request(name, *args), doing)

    def result(self, reply: Future, doing: str) -> Any:
        """Return the value of a reply, or raise its error."""
        while not reply.done():
            self._receive(doing)
        return reply.result()

    def receive_ready(self) -> None:
        """Take the replies that have arrived already."""
        while self._pending and self._pipe.poll():
            self._receive("reading")

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self.closed = True
        self._pipe.close()
        self._process.join(EXIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        atexit.unregister(self.close)

    def _receive(self, doing: str) -> None:
        began = time.monotonic()
        try:
            while not self._pipe.poll(silence.seconds_left()):
                if silence.seconds_left() == 0:
                    log.info("the reader process is %s: %.0f s", doing, time.monotonic() - began)
                    silence.line_logged()
            good, value = self._pipe.recv()
        except (OSError, EOFError):
            raise self._gone() from None
        except BaseException:
            # An interrupt may have left half a reply in the pipe: the rest is unreadable.
            self.close()
            raise
        reply = self._pending.popleft()
        if good:
            reply.set_result(value)
        else:
            reply.set_exception(value)

    def _gone(self) -> UserError:
        self._process.join(EXIT_SECONDS)
        code = self._process.exitcode
        self.close()
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return UserError(
            f"the process that reads the data {how}{memory}; its own message is above. The same "
            "command continues from the last checkpoint. A script of yours must train below "
            '`if __name__ == "__main__":`, because the reader process imports the script'
        )


class _Stream:
    """Training batches from the reader process; BATCHES_AHEAD of them are always requested."""

    def __init__(self, reader: _Reader, args: tuple[Any, ...]):
        self._reader = reader
        reader.streams += 1
        self._number = reader.streams
        self._opened = reader.request("open_stream", self._number, *args)
        self._ahead = collections.deque(self._ask() for _ in range(BATCHES_AHEAD))

    def _ask(self) -> Future:
        return self._reader.request("next_batch", self._number)

    def __iter__(self) -> "_Stream":
        return self

    def __next__(self) -> TrainBatch:
        if self._opened is not None:
            self._reader.result(self._opened, "importing SeqIO")
            self._opened = None
        batch = self._reader.result(self._ahead[0], "filling its shuffle buffers")
        self._ahead.popleft()
        self._ahead.append(self._ask())
        return TrainBatch(batch)

    def has_batch(self) -> bool:
        """Return whether a batch has arrived already."""
        self._reader.receive_ready()
        return self._ahead[0].done()

    def close(self) -> None:
        """Free the stream's buffers in the reader process."""
        if self._number and not self._reader.closed:
            self._reader.request("close_stream", self._number)
        self._number = 0


_reader: _Reader | None = None


def _process() -> _Reader:
    """Return the one reader process of this process; start it if there is none."""
    global _reader
    if _reader is None or _reader.closed:
        _reader = _Reader()
    return _reader


def _serve(pipe: Any, quiet: bool) -> None:
    """Answer requests until the training process closes the pipe or ends."""
    # The training process handles Ctrl-C and a SIGTERM to the whole process group: it may need
    # batches until the running step is saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_up_worker(quiet)
    from cosmo.engine.data import seqio_reader

    requests = seqio_reader.Requests()
    while True:
        try:
            name, args = pipe.recv()
        except (OSError, EOFError):
            return
        try:
            reply = True, getattr(requests, name)(*args)
        # An error of one request must not end the process: the others' streams are in it.
        except Exception as error:
            reply = False, _portable(error)
        try:
            pipe.send(reply)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    """Return an error of ours as it is, any other one as text: not every exception pickles."""
    if isinstance(error, UserError):
        return error
    return RuntimeError("in the reader process:\n" + "".join(traceback.format_exception(error)))
