"""Label single dialogues of many callers at once: dialogues that wait share a batch.

labeller = Labeller(Canary.load("/tmp/canary"))
labeller.warm_up()
chirp = await labeller.label(["Hi!", "I want to scare my kids."], rots=True)
labeller.close()
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import jax

from canary import module
from canary.module import Canary, Chirp
from cosmo.engine.base.errors import QueueFull
from cosmo.engine.data import datasets
from cosmo.engine.infer import batching, infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import safety

log = logging.getLogger("canary")

# A larger batch must be cheaper by so much for each row: its first row waits for its last one.
MIN_GAIN = 0.1
# SentencePiece takes 10 ms for so many characters, in which an event loop would do nothing else.
MAX_INLINE_CHARS = 10_000
# On a CPU a batch takes as long as its rows one after the other, and the first waits for the last.
CPU_BATCH_SIZES, BATCH_SIZES = (1,), (1, 4, 8)
# Padded lengths differ by so many tokens; longer ones by a share of themselves.
LENGTH_STEP, LENGTH_GROWTH = 16, 1.25
# Rules of thumb are written after inputs padded to these lengths, or to the longest of all.
WRITE_LENGTHS = (128,)
# A Canary answers anything with one of the five labels. Another model hardly ever does.
PROBE = ("Hi! How are you?",)
MIN_LABEL_SHARE = 0.5


@dataclasses.dataclass(eq=False)
class _Asked:
    """A dialogue that waits; `dropped` is set when its caller no longer wants the answer."""

    row: datasets.Row
    length: int  # padded
    rots: bool
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    dropped: bool = False


class Labeller:
    """Labels dialogues of many callers on one thread, which alone calls the devices.

    A dialogue waits for the batch in flight and for those that came before it. Rules of thumb are
    written where they are asked for and the label needs them, after the batch's other callers have
    their labels. Answers are those of `Canary.chirp`.

    `batch_sizes` are the batch shapes that `warm_up` compiles: by default CPU_BATCH_SIZES on a CPU,
    else BATCH_SIZES. `decoding` generates the rules of thumb, greedy by default. `counts` has how
    often each thing happened, for metrics.
    """

    # On a CPU, XLA runs the programs of all threads on one pool with a thread a core. Another
    # thread that calls the devices beside this one shares it, and starts no more threads.

    def __init__(
        self,
        canary: Canary,
        *,
        batch_sizes: Sequence[int] | None = None,
        max_queue: int = 256,
        decoding: DecodingConfig | None = None,
        seed: int = 0,
    ):
        session = canary.session
        self.canary, self.max_queue = canary, max_queue
        decoding = decoding or canary.decoding()
        if batch_sizes is None:
            batch_sizes = CPU_BATCH_SIZES if jax.default_backend() == "cpu" else BATCH_SIZES
        # Each device gets as many rows.
        shards = math.lcm(session.layout.mesh.shape["data"], jax.process_count())
        self.batch_sizes = tuple(sorted({-(-size // shards) * shards for size in batch_sizes}))
        longest = session.lengths["inputs"]
        self.lengths = padded_lengths(longest)
        write_lengths = [*(n for n in WRITE_LENGTHS if n < longest), longest]
        self._works = {
            size: infer.ChoiceAndText(
                dataclasses.replace(session, batch_size=size),
                canary.choices,
                decoding,
                seed,
                write_lengths,
            )
            for size in self.batch_sizes
        }
        self._seconds: dict[tuple[int, int], float] = {}  # of a label, by batch size and length
        self.counts: Counter[str] = Counter()
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def warm_up(
        self,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
        *,
        rots: bool = True,
    ) -> None:
        """Compile every shape, then accept dialogues; no later call compiles.

        `on_progress` gets the number of shapes that are done and of all. With `rots` False the
        generation of rules of thumb is left out: the first caller that wants some compiles it.
        The log warns of a model that writes no labels.
        """
        # In the caller's thread, because JAX imports modules when it first compiles.
        shapes = [(size, length) for size in self.batch_sizes for length in self.lengths]
        for done, (size, length) in enumerate(shapes, start=1):
            row = datasets.Row("", "", (self.canary.session.vocabulary.eos_id,) * length)
            group, work = batching.Group([0], [row], length, None), self._works[size]
            for _ in range(2):  # the first call compiles
                began = time.monotonic()
                read = work.read(group)
                work.choices(group, read)
                self._seconds[size, length] = time.monotonic() - began
            if rots:
                # A row without a text: the loop over tokens is compiled, and takes no step.
                work.texts(group, work.write(group, read, [None]))
            on_progress(done, len(shapes))
        self._check_labels()
        self._thread = threading.Thread(target=self._run, name="canary-labeller", daemon=True)
        self._thread.start()

    def _check_labels(self) -> None:
        """Warn if the model answers a greeting with none of the labels."""
        row = self.canary.context(PROBE)
        group = batching.Group([0], [row], self._padded(row), None)
        work = self._works[self.batch_sizes[0]]
        (answer,) = work.choices(group, work.read(group))
        share = sum(map(math.exp, answer.scores))
        if share < MIN_LABEL_SHARE:
            log.warning(
                "the model answers %r with a safety label at a probability of only %.2g: it has "
                "not learnt to label, or was given another --label_style or vocabulary than its "
                "own. Its labels mean nothing; give a checkpoint that Canary's recipes trained",
                PROBE[0],
                share,
            )

    def _padded(self, row: datasets.Row) -> int:
        return next(n for n in self.lengths if n >= len(row.input_ids))

    async def label(self, turns: Sequence[str], *, rots: bool) -> Chirp:
        """Return the Chirp of one dialogue, given as its turns, oldest first.

        Raises UserError for turns that are not a dialogue, and QueueFull if `max_queue` dialogues
        wait. A caller that is cancelled leaves the queue.
        """
        turns = module.turns_of(turns, "the dialogue")
        self._check_room()
        if sum(map(len, turns)) > MAX_INLINE_CHARS:
            loop = asyncio.get_running_loop()
            row = await loop.run_in_executor(None, self.canary.context, turns)
        else:
            row = self.canary.context(turns)
        asked = self._add(row, rots)
        try:
            return await asyncio.wrap_future(asked.future)
        except asyncio.CancelledError:
            asked.dropped = True
            raise

    def close(self) -> None:
        """Finish the batch in flight and stop. Callers that still wait get a RuntimeError."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for asked in left:
            if asked.future.set_running_or_notify_cancel():
                asked.future.set_exception(_closed())
        if self._thread is not None:
            self._thread.join()

    @property
    def queued(self) -> int:
        """Return the number of dialogues that wait for a batch."""
        return len(self._waiting)

    def _check_room(self) -> None:
        if self._closed:
            raise _closed()
        if self._thread is None:
            raise RuntimeError("call warm_up before the first label: it compiles")
        if len(self._waiting) >= self.max_queue:
            self.counts["refused"] += 1
            raise QueueFull(f"{self.max_queue} dialogues wait for a label")

    def _add(self, row: datasets.Row, rots: bool) -> _Asked:
        asked = _Asked(row, self._padded(row), rots)
        with self._changed:
            self._check_room()
            self._waiting.append(asked)
            self._changed.notify()
        return asked

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = self._take()
            # A caller that has left by now costs no computation.
            kept = [asked for asked in batch if asked.future.set_running_or_notify_cancel()]
            self.counts["dropped"] += len(batch) - len(kept)
            try:
                if kept:
                    self._answer(kept)
            except Exception as error:
                # The thread stays: the next batch may be a good one.
                log.exception("a batch of %d dialogues could not be labelled", len(kept))
                self.counts["failed"] += len(kept)
                for asked in kept:
                    if not asked.future.done():
                        asked.future.set_exception(error)

    def _take(self) -> list[_Asked]:
        """Remove the next batch from the queue: the oldest dialogue and others of its length."""
        # The padded length is a function of the row alone, so that an answer does not depend on the
        # rows beside it.
        length = self._waiting[0].length
        same = [asked for asked in self._waiting if asked.length == length]
        batch = same[: self._best_size(len(same), length)]
        # Identity, and the order of the rest stays.
        self._waiting = deque(asked for asked in self._waiting if asked not in batch)
        return batch

    def _best_size(self, count: int, length: int) -> int:
        """Return the batch size that labels `count` dialogues with the least time for each."""
        best, least = self.batch_sizes[0], math.inf
        for size in self.batch_sizes:
            # On a CPU time grows with the rows, padded ones too; on an accelerator it hardly does.
            each = self._seconds[size, length] / min(size, count)
            if each < least * (1 - MIN_GAIN):
                best, least = size, each
        return best

    def _answer(self, batch: Sequence[_Asked]) -> None:
        size = next(size for size in self.batch_sizes if size >= len(batch))
        rows, work = [asked.row for asked in batch], self._works[size]
        group = batching.Group(list(range(len(rows))), rows, batch[0].length, None)
        read = work.read(group)
        answers = work.choices(group, read)
        self.counts.update(batches=1, labels=len(rows), padding=size - len(rows))
        taken: list[int | None] = [None] * len(rows)
        for place, (asked, answer) in enumerate(zip(batch, answers, strict=True)):
            chirp = module.chirp(answer)
            if asked.rots and not asked.dropped and safety.needs_rots(chirp.label):
                taken[place] = safety.LABELS.index(chirp.label)
            else:
                asked.future.set_result(chirp)
        if taken.count(None) == len(taken):
            return
        texts = work.texts(group, work.write(group, read, taken))
        self.counts.update(rots=len(taken) - taken.count(None))
        for asked, answer, text, choice in zip(batch, answers, texts, taken, strict=True):
            if choice is not None:
                whole = dataclasses.replace(text, choice=choice, choice_scores=answer.scores)
                asked.future.set_result(module.chirp(whole))


def padded_lengths(longest: int) -> tuple[int, ...]:
    """Return the lengths in tokens to which dialogues are padded: steps, then a growing share."""
    # Finer than `batching.buckets`: a single label waits for the padding, and each length is one
    # program.
    sizes, size = [], 2 * LENGTH_STEP
    while size * 1.125 < longest:  # a length hardly below the last would save nothing
        sizes.append(size)
        size = LENGTH_STEP * max(size // LENGTH_STEP + 1, round(size * LENGTH_GROWTH / LENGTH_STEP))
    return (*sizes, longest)


def _closed() -> RuntimeError:
    return RuntimeError("the labeller is closed")
