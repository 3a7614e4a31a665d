"""Answer requests that arrive at any time by CTranslate2: `continuous.Scheduler`'s interface.

CTranslate2 begins a batch as a whole. A row can leave it after any token, and none can join it. So
the scheduler starts a batch of all waiting requests of equal settings, and runs several batches at
a time.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cosmo.engine.base.errors import QueueFull, UserError
from cosmo.engine.infer import infer
from cosmo.engine.infer.continuous import (
    Counts,
    Finished,
    Handle,
    OnEvent,
    Sampling,
    Token,
    check_request,
    described_error,
)
from cosmo.engine.model.decoding import DecodingConfig

log = logging.getLogger(__name__)

# Batches at a time, so that an answer does not wait for a long one. More would be smaller: of T5
# 1.1 small in int8 on 2 cores, a token costs 1.5 ms of processor time in a batch of 8, 2.2 ms in
# two of 4, and 3.5 ms in four of 2.
BATCHES = 2
# A request waits so long for others to share its batch: half a step of that model. Eight clients,
# whose answers end together, then ask together again, and not as one and seven.
GATHER_SECONDS = 0.01


class _Sample:
    """One answer. One thread at a time changes it, but for `cancelled`."""

    def __init__(self, request: "_Request", number: int, sampling: Sampling):
        self.request, self.number, self.sampling = request, number, sampling
        self.cancelled = False
        self.finished = False  # its last event was sent
        self.tokens = 0  # sent


class _Request:
    def __init__(self, input_ids, samplings, on_event: OnEvent, deadline: float | None):
        self.input_ids = input_ids
        self.settings = _settings(samplings[0])
        self.on_event = on_event
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.samples = [_Sample(self, number, each) for number, each in enumerate(samplings)]

    @property
    def open(self) -> list[_Sample]:
        """The samples that have not ended."""
        return [sample for sample in self.samples if not sample.finished]


class _Batch:
    """Requests of equal settings that CTranslate2 answers in one call."""

    def __init__(self, requests: Sequence[_Request]):
        self.settings = requests[0].settings
        # A row each, also where samples have one input: CTranslate2 repeats no greedy answer.
        self.samples = [sample for request in requests for sample in request.open]
        self.steps = 0


# How tokens are chosen, and the length of the prefixes: equal for all requests of a batch.
_Settings = tuple[DecodingConfig, int]


def _settings(sampling: Sampling) -> _Settings:
    samples = sampling.temperature > 0.0
    decoding = DecodingConfig(
        # Each row is ended at its own length: batches do not differ by it.
        max_new_tokens=sampling.min_length + 1,
        temperature=sampling.temperature,
        top_k=sampling.top_k if samples else 0,
        top_p=sampling.top_p if samples else 1.0,
        min_length=sampling.min_length,
        block_ngram=sampling.block_ngram,
        banned_ids=sampling.banned_ids,
    )
    return decoding, len(sampling.prefix_ids)


def check_samplings(samplings: Sequence[Sampling]) -> None:
    """Raise UserError for settings of one request that CTranslate2 does not have."""
    for each in samplings:
        for name in ("top_logprobs", "context_block_ngram"):
            if getattr(each, name):
                raise UserError(
                    f"{name}={getattr(each, name)}: CTranslate2 has it not; leave it out, or "
                    "answer by the backend jax",
                    setting=name,
                )
    if len({_settings(each) for each in samplings}) > 1:
        raise UserError(
            "samples of one request differ in their settings: CTranslate2 writes them in one "
            "batch of equal settings; submit them as requests of their own"
        )


class Scheduler:
    """Writes the answers of many requests by CTranslate2, in as many batches as it computes.

    The arguments are those of `continuous.Scheduler`. Seeds of samplings are ignored: threads of
    CTranslate2's draw one random number after another for all rows. Raises UserError for a session
    that JAX answers.
    """

    compilations = 0  # for metrics: CTranslate2 compiles nothing

    def __init__(
        self,
        session: infer.Session,
        *,
        slots: int = 32,
        max_queue: int = 256,
        longest_answer: int | None = None,
    ):
        if session.ctranslate2 is None:
            raise UserError("this scheduler needs a model of CTranslate2's", setting="BACKEND")
        for name, value in {"slots": slots, "max_queue": max_queue}.items():
            if value < 1:
                raise UserError(f"{name}={value}; it must be at least 1", setting=name)
        self.session = session
        self.slots, self.max_queue = slots, max_queue
        self.longest_input = session.lengths["inputs"]
        self.longest_answer = longest_answer or session.lengths["targets"]
        self._model = session.ctranslate2
        self._batches = self._model.translator.num_translators
        self._wake = threading.Condition()
        # The lock of `_wake` guards all that follows.
        self._waiting: list[_Request] = []
        self._exclusive: collections.deque[tuple[Callable, concurrent.futures.Future]] = (
            collections.deque()
        )
        self._running: set[_Batch] = set()
        self._counted: collections.Counter[str] = collections.Counter()
        self._finished: collections.Counter[str] = collections.Counter()
        self._closing = False
        self._thread: threading.Thread | None = None
        # Each waits for one call, which leaves Python's lock to the others.
        self._writers = concurrent.futures.ThreadPoolExecutor(self._batches, "ctranslate2")

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Answer one token, and start the thread. Nothing is compiled."""
        on_progress(0, 1)
        eos = self.session.model.network.special_ids.eos
        self._model.write([(eos,)], DecodingConfig(max_new_tokens=1), [()], lambda *step: True)
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()
        on_progress(1, 1)

    @property
    def counts(self) -> Counts:
        """The present numbers."""
        with self._wake:
            c = self._counted
            return Counts(
                self._active(),
                len(self._waiting),
                c["requests"],
                c["encoder_batches"],
                c["steps"],
                c["tokens"],
                dict(self._finished),
            )

    def submit(
        self,
        input_ids: Sequence[int],
        samplings: Sequence[Sampling],
        on_event: OnEvent,
        *,
        timeout: float | None = None,
    ) -> Handle:
        """Queue a request for `len(samplings)` answers to one input.

        As `continuous.Scheduler.submit`, but `on_event` is called in a thread of CTranslate2's or
        of the scheduler's, one at a time. Raises QueueFull, and UserError for what the model
        cannot answer.
        """
        check_request(
            self.session.model.network,
            input_ids,
            samplings,
            slots=self.slots,
            longest_input=self.longest_input,
            longest_answer=self.longest_answer,
        )
        check_samplings(samplings)
        deadline = None if timeout is None else time.monotonic() + timeout
        request = _Request(tuple(map(int, input_ids)), tuple(samplings), on_event, deadline)
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait; at most {self.max_queue} may")
            self._waiting.append(request)
            self._wake.notify()
        return Handle(self, request.samples)

    def run_exclusive(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run `function` in the scheduler's thread between batches. Return its future result."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            self._check_open()
            self._exclusive.append((function, future))
            self._wake.notify()
        return future

    def close(self, drain: bool) -> None:
        """Stop the threads. With `drain` all requests end first; without, they are cancelled."""
        with self._wake:
            self._closing = True
            if not drain:
                requests = [*self._waiting, *(s.request for b in self._running for s in b.samples)]
                for request in requests:
                    for sample in request.samples:
                        sample.cancelled = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._writers.shutdown()
        self._model.wait_until_idle()

    def _check_open(self) -> None:
        if self._thread is None:
            raise RuntimeError("call warm_up before the first request")
        if self._closing:
            raise RuntimeError("the scheduler is closed")

    def _cancel(self, samples: Sequence[_Sample]) -> None:
        with self._wake:
            for sample in samples:
                sample.cancelled = True
            self._wake.notify()

    def _active(self) -> int:
        return sum(not sample.finished for batch in self._running for sample in batch.samples)

    # Called in the scheduler's thread alone.

    def _loop(self) -> None:
        while work := self._next_work():
            work()

    def _next_work(self) -> Callable[[], None] | None:
        """Wait until there is work, and return it; None once the scheduler is closed."""
        with self._wake:
            while True:
                # One time for all below: what is not due yet is waited for.
                now = time.monotonic()
                ended = self._take_ended(now)
                if ended:
                    return lambda: [self._finish(sample, reason) for sample, reason in ended]
                if self._exclusive:
                    # No new batch until those in progress have ended and it was run.
                    if not self._running:
                        function, future = self._exclusive.popleft()
                        return lambda: _run(function, future)
                elif batch := self._take_batch(now):
                    return lambda: self._start(batch)
                elif self._closing and not self._waiting and not self._running:
                    return None
                self._wake.wait(self._seconds_to_wait(now))

    def _take_ended(self, now: float) -> list[tuple[_Sample, str]]:
        """Return the waiting samples that were cancelled or are late, and drop such requests."""
        ended = [
            (sample, reason)
            for request in self._waiting
            for sample in request.open
            if (reason := _reason_to_end(sample, now))
        ]
        gone = {sample for sample, _ in ended}
        self._waiting = [r for r in self._waiting if not gone.issuperset(r.open)]
        return ended

    def _seconds_to_wait(self, now: float) -> float | None:
        """Return the time until a waiting request is late, or its batch may begin."""
        moments = [r.deadline for r in self._waiting if r.deadline is not None]
        moments += [r.submitted + GATHER_SECONDS for r in self._waiting[:1]]
        # One that is past waits for a batch to end, and is woken then.
        return min((moment - now for moment in moments if moment > now), default=None)

    def _take_batch(self, now: float) -> _Batch | None:
        """Take the first waiting request and all that go with it, as far as slots are free."""
        if len(self._running) >= self._batches or not self._waiting:
            return None
        first, free = self._waiting[0], self.slots - self._active()
        if now < first.submitted + GATHER_SECONDS:
            return None
        # In their order: a request for many samples waits at the head until it fits.
        if len(first.open) > free:
            return None
        taken: list[_Request] = []
        for request in self._waiting:
            if request.settings == first.settings:
                free -= len(request.open)
                if free < 0:
                    break
                taken.append(request)
        self._waiting = [request for request in self._waiting if request not in taken]
        batch = _Batch(taken)
        self._running.add(batch)
        self._counted["requests"] += len(taken)
        self._counted["encoder_batches"] += 1
        return batch

    def _start(self, batch: _Batch) -> None:
        self._writers.submit(self._write, batch)

    # Called in a thread of each batch, and `_step` in CTranslate2's.

    def _write(self, batch: _Batch) -> None:
        """Write a batch's answers to their end."""
        decoding, _ = batch.settings
        longest = max(sample.sampling.max_new_tokens for sample in batch.samples)
        error = None
        try:
            self._model.write(
                [sample.request.input_ids for sample in batch.samples],
                dataclasses.replace(decoding, max_new_tokens=longest),
                [sample.sampling.prefix_ids for sample in batch.samples],
                lambda *step: self._step(batch, *step),
            )
        except Exception as caught:
            log.exception("a batch failed; its requests end")
            error = described_error(caught)
        for sample in batch.samples:
            if not sample.finished:
                self._finish(sample, "error", error or "CTranslate2 ended the answer too soon")
        with self._wake:
            self._running.remove(batch)
            self._wake.notify()

    def _step(self, batch: _Batch, row: int, step: int, id: int, nats: float) -> bool:
        """Send a row's token. Return whether the row ends."""
        sample = batch.samples[row]
        reason = _reason_to_end(sample, time.monotonic())
        if reason:
            self._finish(sample, reason)
            return True
        _, given = batch.settings
        new = step >= given  # CTranslate2 reads a prefix token by token, too
        with self._wake:
            if step >= batch.steps:
                batch.steps = step + 1
                self._counted["steps"] += 1
            self._counted["tokens"] += new
        if not new:
            return False
        sample.tokens += 1
        self._send(sample, Token(id, nats, ()))
        if id == self.session.model.network.special_ids.eos:
            self._finish(sample, "stop")
        elif sample.tokens >= sample.sampling.max_new_tokens:
            self._finish(sample, "length")
        return sample.finished

    # Called in the thread that has the sample.

    def _finish(self, sample: _Sample, reason: str, error: str | None = None) -> None:
        with self._wake:
            sample.finished = True
            self._finished[reason] += 1
            self._wake.notify()  # its slot is free
        self._send(sample, Finished(reason, error))

    def _send(self, sample: _Sample, event: Token | Finished) -> None:
        try:
            sample.request.on_event(sample.number, event)
        except Exception:
            # Such as a closed event loop. The other requests are written to their end.
            log.exception("a receiver of tokens failed; its request ends")
            for each in sample.request.samples:
                each.cancelled = True


def _reason_to_end(sample: _Sample, now: float) -> str | None:
    deadline = sample.request.deadline
    if sample.cancelled:
        return "cancelled"
    return "deadline" if deadline is not None and now >= deadline else None


def _run(function: Callable[[], Any], future: concurrent.futures.Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
