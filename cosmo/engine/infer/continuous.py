"""Answer requests that arrive at any time in shared steps: continuous batching.

A `Scheduler` has one thread that calls the devices. Between two steps it lets new requests in,
takes out those that ended or were cancelled, and runs what `run_exclusive` was given. `slots` has
the arrays and programs; nothing is compiled after `Scheduler.warm_up`.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cosmo.engine.base.errors import QueueFull, UserError
from cosmo.engine.infer import infer
from cosmo.engine.model import decoding, partitioning, slots
from cosmo.engine.model.slots import MAX_TOP_LOGPROBS

log = logging.getLogger(__name__)

ENCODER_ROWS = (1, 4, 8)  # inputs that one encoder program takes
# Tokens of an encoder program of several rows: bounds how long answers in progress wait for it.
ENCODER_TOKENS = 2048
SHORTEST_INPUT = 64  # tokens; lengths of programs double from here
PROGRESS_SECONDS = 5.0
COMPILE_THREADS = 4

Token = slots.Result


class Finished(NamedTuple):
    """The last event of a sample.

    `reason` is "stop" (EOS), "length", "cancelled", "deadline" or "error", with its text in
    `error`.
    """

    reason: str
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to write one sample. All settings may differ between samples that share a step.

    The fields are those of `decoding.DecodingConfig`. `seed` is the number of a record's random
    key: `infer.row_seed(seed, id)` gives the samples that `infer.generation` draws for it.
    `top_logprobs` asks for so many of the likeliest tokens at each step. The answer begins with
    `prefix_ids`, which are not events and count for no length.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    top_logprobs: int = 0
    min_length: int = 0
    block_ngram: int = 0
    context_block_ngram: int = 0
    banned_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "banned_ids", tuple(self.banned_ids))
        object.__setattr__(self, "prefix_ids", tuple(self.prefix_ids))
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            # Comparisons with NaN are false.
            "temperature": (0.0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "top_k": (0 <= self.top_k < 2**31, "0 (off) or above"),
            "seed": (0 <= self.seed < 2**32, "an unsigned integer of 32 bits"),
            "top_logprobs": (
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                f"0 (off) to {MAX_TOP_LOGPROBS}",
            ),
            "min_length": (
                0 <= self.min_length < self.max_new_tokens,
                f"0 (off) or above, and below max_new_tokens={self.max_new_tokens}",
            ),
            "block_ngram": (
                0 <= self.block_ngram <= decoding.MAX_NGRAM,
                f"0 (off) to {decoding.MAX_NGRAM}",
            ),
            "context_block_ngram": (
                0 <= self.context_block_ngram <= decoding.MAX_NGRAM,
                f"0 (off) to {decoding.MAX_NGRAM}",
            ),
            "banned_ids": (
                len(self.banned_ids) <= slots.MAX_BANNED_IDS,
                f"at most {slots.MAX_BANNED_IDS} ids",
            ),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise UserError(f"Sampling.{name}={getattr(self, name)!r}; it must be {rule}")


def check_request(
    network: Any,
    input_ids: Sequence[int],
    samplings: Sequence[Sampling],
    *,
    slots: int,
    longest_input: int,
    longest_answer: int,
) -> None:
    """Raise UserError for a request that the network, or a scheduler's limits, cannot answer."""
    vocab, eos = network.vocab_size, network.special_ids.eos
    if not 0 < len(input_ids) <= longest_input:
        raise UserError(
            f"an input of {len(input_ids)} tokens; this model takes 1 to {longest_input}",
            setting="input_ids",
        )
    if not all(0 < id < vocab for id in input_ids):
        raise UserError(f"input ids must be 1 to {vocab - 1}", setting="input_ids")
    if not 0 < len(samplings) <= slots:
        raise UserError(
            f"{len(samplings)} samples of one input; 1 to {slots} are possible",
            setting="n",
        )
    for each in samplings:
        total = len(each.prefix_ids) + each.max_new_tokens
        if total > longest_answer:
            raise UserError(
                f"an answer of {total} tokens, its prefix included; at most "
                f"{longest_answer} are possible",
                setting="max_new_tokens",
            )
        if not all(0 < id < vocab and id != eos for id in each.prefix_ids):
            raise UserError(
                f"prefix ids must be 1 to {vocab - 1}, but not {eos}, which ends texts",
                setting="prefix_ids",
            )
        if not all(0 <= id < vocab and id != eos for id in each.banned_ids):
            raise UserError(
                f"banned ids must be 0 to {vocab - 1}, but not {eos}, which ends texts",
                setting="banned_ids",
            )


OnEvent = Callable[[int, Token | Finished], None]


class Handle:
    """A request that was submitted. `cancel` may be called from any thread."""

    def __init__(self, scheduler: Any, samples: Sequence[Any]):
        self._scheduler, self._samples = scheduler, samples

    def cancel(self, number: int | None = None) -> None:
        """End sample `number`, or all of them, before the next step."""
        chosen = self._samples if number is None else [self._samples[number]]
        self._scheduler._cancel(chosen)


class _Sample:
    """One answer in progress. Only the scheduler's thread changes it, but for `cancelled`."""

    def __init__(self, request: "_Request", number: int, sampling: Sampling):
        self.request, self.number, self.sampling = request, number, sampling
        self.cancelled = False
        self.finished = False  # its last event was sent
        self.steps = 0  # that were started for it
        self.read = 0  # of which results were read
        self.row: int | None = None

    @property
    def last_step(self) -> int:
        """The number of steps after which its length is reached."""
        return len(self.sampling.prefix_ids) + self.sampling.max_new_tokens


class _Request:
    def __init__(self, input_ids, samplings, on_event: OnEvent, deadline: float | None):
        self.input_ids = input_ids
        self.on_event = on_event
        self.deadline = deadline
        self.samples = [_Sample(self, number, each) for number, each in enumerate(samplings)]


class Counts(NamedTuple):
    """The numbers of a scheduler, for metrics.

    `active` are samples being written, `queued` requests that wait. The others count from the
    start: `requests` that were encoded in so many `encoder_batches`, `steps`, `tokens` sent, and
    samples that ended, by reason.
    """

    active: int
    queued: int
    requests: int
    encoder_batches: int
    steps: int
    tokens: int
    finished: dict[str, int]


class _Programs:
    """The compiled programs of one shape of pool. They are kept: see `_programs`."""

    def __init__(self, model, layout: partitioning.Layout, rows: int, inputs: int, answers: int):
        self.model, self.layout = model, layout
        self.rows, self.inputs, self.answers = rows, inputs, answers
        self.row_counts = _doubling(1, rows)
        self.lengths = _doubling(SHORTEST_INPUT, inputs)
        abstract = jax.eval_shape(functools.partial(slots.empty, model, rows, inputs, answers))
        self.pool_shardings = slots.pool_shardings(layout, abstract)
        self.pool = _described(abstract, self.pool_shardings)
        self._compiled: dict[Any, Callable] = {}

    def encoder_rows(self, length: int) -> list[int]:
        """Return how many inputs the encoder's programs of this length take."""
        # None takes so many that a smaller one had room for all that the pool holds.
        most = min(ENCODER_TOKENS // length, 2 * self.rows - 1)
        return [rows for rows in ENCODER_ROWS if rows <= max(1, most)]

    def names(self) -> list[tuple[Any, ...]]:
        """Return the names of all programs, for `program`."""
        encoders = [(rows, length) for length in self.lengths for rows in self.encoder_rows(length)]
        return [
            ("empty",),
            ("move",),
            ("insert",),
            *[("encode", *shape) for shape in encoders],
            *[("choose", rows) for rows in self.row_counts],
            *[("step", rows, length) for length in self.lengths for rows in self.row_counts],
        ]

    def program(self, name: tuple[Any, ...], params: Any) -> Callable:
        """Return the compiled program of a name: a kind (see `_lowered`) and a shape."""
        if name not in self._compiled:
            self._compiled[name] = self._lowered(name, params).compile()
        return self._compiled[name]

    def compile_all(self, params: Any, on_progress: Callable[[int, int], None]) -> None:
        """Compile every program, several at a time. `on_progress` is called every few seconds."""
        missing = [name for name in self.names() if name not in self._compiled]
        done = len(self.names()) - len(missing)
        total = done + len(missing)
        on_progress(done, total)
        if missing:
            # The first one here: no thread of ours imports anything, and compiling does at first.
            self.program(missing[0], params)
            done += 1
        with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as pool:
            begun: dict[concurrent.futures.Future, tuple[Any, ...]] = {}
            shown = time.monotonic()
            for name in missing[1:]:
                # Tracing holds Python's lock anyway, and stays in this thread.
                begun[pool.submit(self._lowered(name, params).compile)] = name
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    on_progress(done + sum(f.done() for f in begun), total)
            left = set(begun)
            while left:
                _, left = concurrent.futures.wait(left, PROGRESS_SECONDS)
                if left:
                    on_progress(total - len(left), total)
        for future, name in begun.items():
            self._compiled[name] = future.result()
        on_progress(total, total)

    def _lowered(self, name: tuple[Any, ...], params: Any) -> jax.stages.Lowered:
        """Return a traced program: "empty", "move", "encode", "insert", "step" or "choose"."""
        kind, *shape = name
        model, scalar = self.model, jax.ShapeDtypeStruct((), np.int32)
        if kind == "empty":
            function = functools.partial(slots.empty, model, self.rows, self.inputs, self.answers)
            return self._jit(function, self.pool_shardings).lower()
        if kind == "move":
            jitted = self._jit(slots.move, self.pool_shardings, donate=0)
            return jitted.lower(self.pool, scalar, scalar)
        if kind == "encode":
            function = functools.partial(slots.encode, model, inputs=self.inputs)
            jitted = self._jit(function, [self._encoded()[1]] * shape[0])
            return jitted.lower(_of(params), jax.ShapeDtypeStruct(shape, np.int32))
        if kind == "insert":
            encoded = _described(*self._encoded())
            jitted = self._jit(functools.partial(slots.insert, model), self.pool_shardings, 0)
            one = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), slots.settings(self.answers)
            )
            return jitted.lower(self.pool, encoded, scalar, one)
        whole = partitioning.replicated(self.layout.mesh)
        written, written_shardings = self._written(shape[0])
        if kind == "step":
            rows, length = shape
            function = functools.partial(slots.step, model, rows=rows, length=length)
            jitted = self._jit(function, (whole, written_shardings))
            return jitted.lower(_of(params), self.pool)
        vocab = model.network.vocab_size
        logits = jax.ShapeDtypeStruct((*shape, vocab), np.float32, sharding=whole)
        active = jax.ShapeDtypeStruct((self.rows,), bool)
        function = functools.partial(slots.choose, model)
        jitted = self._jit(function, (self.pool_shardings, whole), donate=0)
        return jitted.lower(self.pool, logits, written, active)

    def _written(self, rows: int):
        """Return (abstract keys and values of a step, their shardings)."""
        c = self.model.network
        shape = (rows, c.num_heads, c.head_dim)
        sharding = self.layout.sharding(shape, (None, "heads", None))
        one = jax.ShapeDtypeStruct(shape, c.dtype, sharding=sharding)
        layers = c.num_decoder_layers
        return [(one, one)] * layers, [(sharding, sharding)] * layers

    def _encoded(self):
        """Return (abstract Encoded, its shardings)."""
        c, length = self.model.network, self.inputs
        heads = (1, c.num_heads)
        key = jax.ShapeDtypeStruct((*heads, c.head_dim, length), c.dtype)
        value = jax.ShapeDtypeStruct((*heads, length, c.head_dim), c.dtype)
        tokens = jax.ShapeDtypeStruct((1, length), np.int32)
        abstract = slots.Encoded([(key, value)] * c.num_decoder_layers, tokens)
        return abstract, slots.pool_shardings(self.layout, abstract)

    def _jit(self, function, out_shardings, donate: int | tuple[int, ...] = ()):
        @functools.wraps(function)
        def laid_out(*args):
            with self.layout.active():
                return function(*args)

        return jax.jit(laid_out, out_shardings=out_shardings, donate_argnums=donate)


def _described(abstract, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def _of(params):
    """Return arrays as their descriptions."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )


# Kept by value, as `infer._compiled` keeps its own: schedulers of equal settings share them.
@functools.lru_cache(maxsize=8)
def _programs(model, layout, rows: int, inputs: int, answers: int) -> _Programs:
    return _Programs(model, layout, rows, inputs, answers)


def _doubling(first: int, last: int) -> list[int]:
    """Return `first`, twice it and so on, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


def _fitting(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


_COMPILATIONS: collections.Counter[int] = collections.Counter()  # by thread


def _count_compilation(event: str, duration: float, **named: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILATIONS[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class Scheduler:
    """Writes the answers of many requests in shared steps, in one thread that calls the devices.

    `slots` samples are written at a time, and at most `max_queue` requests wait. An answer and its
    prefix have at most `longest_answer` tokens (by default the session's targets), an input at most
    `longest_input`. Raises UserError for a session on devices that each hold a copy of the model.
    """

    def __init__(
        self,
        session: infer.Session,
        *,
        slots: int = 32,
        max_queue: int = 256,
        longest_answer: int | None = None,
    ):
        session.check_jax("continuous batching")
        copies = session.layout.mesh.shape["data"]
        if copies > 1 or jax.process_count() > 1:
            raise UserError(
                f"this session has {copies} copies of the model on {jax.device_count()} devices of "
                f"{jax.process_count()} hosts; continuous batching runs one copy: split it over "
                "all devices of one host, or make one device visible",
                setting="num_partitions",
            )
        for name, value in {"slots": slots, "max_queue": max_queue}.items():
            if value < 1:
                raise UserError(f"{name}={value}; it must be at least 1", setting=name)
        network = session.model.network
        self.session = session
        self.slots, self.max_queue = slots, max_queue
        self.longest_input = session.lengths["inputs"]
        self.longest_answer = longest_answer or session.lengths["targets"]
        if network.max_positions is not None:
            self.longest_answer = min(self.longest_answer, network.max_positions)
        self._eos = network.special_ids.eos
        self._programs = _programs(
            session.model, session.layout, slots, self.longest_input, self.longest_answer
        )
        self._wake = threading.Condition()
        self._waiting: collections.deque[_Request] = collections.deque()
        self._exclusive: collections.deque[tuple[Callable, concurrent.futures.Future]] = (
            collections.deque()
        )
        self._rows: list[_Sample | None] = [None] * slots
        self._pool: Any = None
        # Results of a step that was started: read after the next one is.
        self._pending: tuple[jax.Array, list[tuple[int, _Sample]]] | None = None
        self._counted: collections.Counter[str] = collections.Counter()
        self._finished: collections.Counter[str] = collections.Counter()
        self._compiled_before = 0  # by an earlier thread of the same number
        self._closing: str | None = None  # "drain" or "stop"
        self._thread: threading.Thread | None = None

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile every program, make the pool, and start the thread.

        `on_progress(done, total)` counts programs; it is called every few seconds.
        """
        self._programs.compile_all(self.session.params, on_progress)
        self._pool = self._run("empty")
        jax.block_until_ready(self._pool)
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        started = threading.Event()
        self._exclusive.append((started.set, concurrent.futures.Future()))
        self._thread.start()
        started.wait()

    @property
    def compilations(self) -> int:
        """The number of programs that the thread has compiled since `warm_up`: 0."""
        if self._thread is None:
            return 0
        return _COMPILATIONS[self._thread.ident] - self._compiled_before

    @property
    def counts(self) -> Counts:
        """The present numbers."""
        c = self._counted
        return Counts(
            sum(sample is not None for sample in self._rows),
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
        """Queue a request for `len(samplings)` answers to one input, which is encoded once.

        `on_event(number, event)` is called in the scheduler's thread, with tokens and at last a
        Finished for each sample; it must not block. After `timeout` seconds the samples end with
        the reason "deadline".

        Raises QueueFull, and UserError for what the model cannot answer.
        """
        check_request(
            self.session.model.network,
            input_ids,
            samplings,
            slots=self.slots,
            longest_input=self.longest_input,
            longest_answer=self.longest_answer,
        )
        deadline = None if timeout is None else time.monotonic() + timeout
        request = _Request(tuple(map(int, input_ids)), tuple(samplings), on_event, deadline)
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait; at most {self.max_queue} may")
            self._waiting.append(request)
            self._wake.notify()
        return Handle(self, request.samples)

    def _check_open(self) -> None:
        if self._thread is None:
            raise RuntimeError("call warm_up before the first request")
        if self._closing:
            raise RuntimeError("the scheduler is closed")

    def run_exclusive(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run `function` in the scheduler's thread between two steps. Return its future result."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            self._check_open()
            self._exclusive.append((function, future))
            self._wake.notify()
        return future

    def close(self, drain: bool) -> None:
        """Stop the thread. With `drain` all requests end first; without, they are cancelled."""
        with self._wake:
            # A second call may stop what the first one drains.
            self._closing = "drain" if drain and self._closing != "stop" else "stop"
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _cancel(self, samples: Sequence[_Sample]) -> None:
        with self._wake:
            for sample in samples:
                sample.cancelled = True
            self._wake.notify()

    # The functions below are called in the scheduler's thread alone.

    def _loop(self) -> None:
        self._compiled_before = _COMPILATIONS[threading.get_ident()]
        while self._work_or_wait():
            try:
                self._turn()
            except Exception as error:
                log.exception("a step failed; its requests end")
                self._fail(described_error(error))
        for _function, future in self._exclusive:
            future.cancel()

    def _work_or_wait(self) -> bool:
        """Wait until there is work. Return whether there is; no, once the scheduler is closed."""
        with self._wake:
            while True:
                if self._closing == "stop":
                    for request in self._waiting:
                        for sample in request.samples:
                            sample.cancelled = True
                    for sample in self._rows:
                        if sample is not None:
                            sample.cancelled = True
                busy = self._pending is not None or any(self._rows) or self._waiting
                if busy or self._exclusive:
                    return True
                if self._closing:
                    return False
                self._wake.wait()

    def _turn(self) -> None:
        """Run one exclusive function, one encoder batch and one step, as far as there are any."""
        self._run_one_exclusive()
        self._drop_ended()
        self._admit()
        started = self._start_step()
        # The devices work on the new step while the last one's tokens are sent out.
        pending, self._pending = self._pending, started
        if pending is None:
            return
        try:
            self._read(*pending)
        except Exception as error:
            # Samples whose last step this was are in no row any more.
            for _, sample in pending[1]:
                self._finish(sample, "error", described_error(error))
            raise

    def _run_one_exclusive(self) -> None:
        with self._wake:
            if not self._exclusive:
                return
            function, future = self._exclusive.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def _drop_ended(self) -> None:
        """Free the rows of samples that were cancelled or are late, and drop such requests."""
        now = time.monotonic()
        for sample in [s for s in self._rows if s is not None]:
            self._drop(sample, now)
        with self._wake:
            waiting = list(self._waiting)
        for request in waiting:
            for sample in request.samples:
                self._drop(sample, now)
        with self._wake:
            # Others may have been added meanwhile; those that ended are dropped.
            kept = [r for r in self._waiting if not all(s.finished for s in r.samples)]
            self._waiting.clear()
            self._waiting.extend(kept)

    def _drop(self, sample: _Sample, now: float) -> None:
        deadline = sample.request.deadline
        if sample.cancelled:
            self._finish(sample, "cancelled")
        elif deadline is not None and now >= deadline:
            self._finish(sample, "deadline")

    def _admit(self) -> None:
        """Encode waiting requests that free rows can take: one encoder batch at most."""
        free = [row for row, sample in enumerate(self._rows) if sample is None]
        taken: list[_Request] = []
        programs = self._programs
        with self._wake:
            while self._waiting:
                request = self._waiting[0]
                longest = max(len(r.input_ids) for r in [*taken, request])
                most = programs.encoder_rows(_fitting(programs.lengths, longest))[-1]
                needed = sum(1 for s in request.samples if not s.finished)
                # In their order: a request for many samples waits at the head until it fits.
                if len(taken) >= most or needed > len(free) - _wanted(taken):
                    break
                taken.append(self._waiting.popleft())
        if not taken:
            return
        try:
            self._insert(taken, free)
        except Exception as error:
            # The pool was given to the program that failed: `_fail` ends what is in its rows.
            for request in taken:
                for sample in request.samples:
                    self._finish(sample, "error", described_error(error))
            raise

    def _insert(self, taken: list[_Request], free: list[int]) -> None:
        if self._pool is None:
            self._pool = self._run("empty")
        programs = self._programs
        length = _fitting(programs.lengths, max(len(r.input_ids) for r in taken))
        rows = _fitting(programs.encoder_rows(length), len(taken))
        tokens = np.zeros((rows, length), np.int32)
        for place in range(rows):
            # Rows of padding repeat the first: a row of nothing would have nothing to attend to.
            ids = taken[place if place < len(taken) else 0].input_ids
            tokens[place, : len(ids)] = ids
        encoded = self._run("encode", rows, length, self.session.params, tokens)
        for place, request in enumerate(taken):
            for sample in request.samples:
                if sample.finished:
                    continue
                row = free.pop(0)
                chosen = dataclasses.asdict(sample.sampling)
                del chosen["max_new_tokens"]
                settings = slots.settings(self.longest_answer, number=sample.number, **chosen)
                self._pool = self._run(
                    "insert", self._pool, encoded[place], np.int32(row), settings
                )
                self._rows[row], sample.row = sample, row
        self._counted["requests"] += len(taken)
        self._counted["encoder_batches"] += 1

    def _start_step(self) -> tuple[jax.Array, list[tuple[int, _Sample]]] | None:
        """Start a step of all active rows. Return (its results to be, the rows' samples)."""
        self._compact()
        active = [(row, sample) for row, sample in enumerate(self._rows) if sample is not None]
        if not active:
            return None
        programs = self._programs
        rows = _fitting(programs.row_counts, active[-1][0] + 1)
        longest = max(len(sample.request.input_ids) for _, sample in active)
        length = _fitting(programs.lengths, longest)
        mask = np.zeros((self.slots,), bool)
        mask[[row for row, _ in active]] = True
        logits, written = self._run("step", rows, length, self.session.params, self._pool)
        self._pool, results = self._run("choose", rows, self._pool, logits, written, mask)
        self._counted["steps"] += 1
        for row, sample in active:
            sample.steps += 1
            # Its last token is on its way: the row is free for the next step.
            if sample.steps >= sample.last_step:
                self._rows[row] = None
        return results, active

    def _compact(self) -> None:
        """Move the last rows into free ones where the step gets a smaller program by it."""
        counts = self._programs.row_counts
        while True:
            used = [row for row, sample in enumerate(self._rows) if sample is not None]
            if not used or _fitting(counts, used[-1] + 1) == _fitting(counts, len(used)):
                return
            source, target = used[-1], self._rows.index(None)
            self._pool = self._run("move", self._pool, np.int32(source), np.int32(target))
            self._rows[target], self._rows[source] = self._rows[source], None
            self._rows[target].row = target

    def _read(self, results: jax.Array, active: list[tuple[int, _Sample]]) -> None:
        """Wait for a step's results and send them out."""
        results_RO = np.asarray(results)
        for row, sample in active:
            sample.read += 1
            given = len(sample.sampling.prefix_ids)
            if sample.finished or sample.read <= given:
                continue
            token = slots.read_result(results_RO, row, sample.sampling.top_logprobs)
            self._counted["tokens"] += 1
            self._send(sample, token)
            if token.id == self._eos:
                self._finish(sample, "stop")
            elif sample.read - given >= sample.sampling.max_new_tokens:
                self._finish(sample, "length")

    def _finish(self, sample: _Sample, reason: str, error: str | None = None) -> None:
        if sample.finished:
            return
        sample.finished = True
        self._finished[reason] += 1
        if sample.row is not None and self._rows[sample.row] is sample:
            self._rows[sample.row] = None
        self._send(sample, Finished(reason, error))

    def _send(self, sample: _Sample, event: Token | Finished) -> None:
        try:
            sample.request.on_event(sample.number, event)
        except Exception:
            # Such as a closed event loop. The other requests are written to their end.
            log.exception("a receiver of tokens failed; its request ends")
            for each in sample.request.samples:
                each.cancelled = True

    def _fail(self, error: str) -> None:
        """End all requests that were in the pool, and drop it."""
        pending, self._pending = self._pending, None
        samples = [s for s in self._rows if s is not None]
        samples += [s for _, s in pending[1]] if pending else []
        for sample in samples:
            self._finish(sample, "error", error)
        self._rows = [None] * self.slots
        # Made anew for the next request: if that fails too, that request ends and not the thread.
        self._pool = None

    def _run(self, kind: str, *args: Any) -> Any:
        """Call a program by its kind, the numbers of its shape and its arguments."""
        shape = [arg for arg in args if isinstance(arg, int)]
        return self._programs.program((kind, *shape), self.session.params)(*args[len(shape) :])


def described_error(error: Exception) -> str:
    """Return the text of `Finished.error` for an exception."""
    return f"{type(error).__name__}: {error}"


def _wanted(requests: Sequence[_Request]) -> int:
    return sum(not sample.finished for request in requests for sample in request.samples)
