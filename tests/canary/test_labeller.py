"""The labeller: many callers, one thread, the same answers as `Canary.chirp`."""

import asyncio
import itertools
import logging
import math
import threading

import jax
import pytest

from canary.labeller import Labeller, padded_lengths
from cosmo.engine.base.errors import QueueFull, UserError
from cosmo.engine.infer.infer import Answer
from tests.canary.test_canary_module import DIALOGUES, close

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def compilations() -> list[str]:
    """The programs that XLA has compiled, by JAX's own events."""
    seen = []

    def count(name, seconds, **more):
        if name == COMPILED:
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    return seen


@pytest.fixture(scope="module")
def labeller(canary, compilations):
    made = Labeller(canary, batch_sizes=(1, 4), max_queue=8)
    seen = []
    made.warm_up(lambda done, of: seen.append((done, of)))
    assert seen == [(n, len(seen)) for n in range(1, len(seen) + 1)]
    yield made
    made.close()


def gather(*calls):
    async def run():
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


class Gate:
    """Holds the labeller's thread inside a batch, and fails that batch if `error` is set."""

    def __init__(self, labeller, monkeypatch, error=None):
        self.entered, self.open, self.batches = threading.Event(), threading.Event(), []
        answer = labeller._answer

        def held(batch):
            self.batches.append([asked.row.inputs for asked in batch])
            self.entered.set()
            assert self.open.wait(20)
            if error:
                raise error
            answer(batch)

        monkeypatch.setattr(labeller, "_answer", held)


async def fill(labeller, gate, turns, count):
    """Return a call whose batch is held, and `count` others that wait."""
    first = asyncio.ensure_future(labeller.label(["Held."], rots=False))
    while not gate.entered.is_set():
        await asyncio.sleep(0.001)
    others = [asyncio.ensure_future(labeller.label(turns, rots=False)) for _ in range(count)]
    await asyncio.sleep(0)
    return first, others


@pytest.mark.parametrize("rots", [True, False])
def test_answers_are_those_of_chirp(canary, labeller, compilations, rots):
    """Oracle: `Canary.chirp` of each dialogue. No program is compiled for them."""
    wanted = canary.chirp(DIALOGUES, rots=rots)
    assert len({chirp.label for chirp in wanted}) > 1
    before = len(compilations)
    assert before > 0
    asked = [*DIALOGUES, ["word " * 200, "last"]]
    for number in range(1, 6):  # of callers: batches of every size
        found = gather(*(labeller.label(turns, rots=rots) for turns in asked[:number]))
        assert all(map(close, found, wanted[:number]))
    (long,) = gather(labeller.label(asked[-1], rots=rots))
    assert len(compilations) == before
    assert close(long, canary.chirp(asked[-1], rots=rots))


def test_dialogues_that_wait_share_a_batch(labeller, monkeypatch):
    """Oracle: the batches, by hand. The oldest goes first, with others of its length."""
    # As on an accelerator, where a batch takes as long as a row.
    monkeypatch.setattr(labeller, "_seconds", dict.fromkeys(labeller._seconds, 1.0))
    gate = Gate(labeller, monkeypatch)

    async def run():
        first, others = await fill(labeller, gate, ["Short."], 2)
        others.append(asyncio.ensure_future(labeller.label(["word " * 200], rots=False)))
        others.append(asyncio.ensure_future(labeller.label(["Shorter."], rots=False)))
        await asyncio.sleep(0.01)
        gate.open.set()
        await asyncio.gather(first, *others)

    asyncio.run(run())
    held, shared, long = gate.batches
    assert held == ["Held."] and shared == ["Short.", "Short.", "Shorter."] and len(long) == 1


def test_batch_size_is_the_cheapest_for_each_row(labeller, monkeypatch):
    """Oracle: by hand."""
    length = labeller.lengths[0]
    # Time that grows with the rows: alone is never dearer, and quicker for the first.
    monkeypatch.setattr(labeller, "_seconds", {(1, length): 1.0, (4, length): 4.0})
    assert [labeller._best_size(n, length) for n in (1, 2, 4, 9)] == [1, 1, 1, 1]
    monkeypatch.setattr(labeller, "_seconds", {(1, length): 1.0, (4, length): 1.5})
    assert [labeller._best_size(n, length) for n in (1, 2, 4, 9)] == [1, 4, 4, 4]


def test_callers_that_leave_cost_nothing(labeller, monkeypatch):
    """Oracle: the batches that were sent."""
    gate = Gate(labeller, monkeypatch)
    before = labeller.counts["dropped"]

    async def run():
        first, others = await fill(labeller, gate, ["Gone."], 3)
        for one in (first, *others):  # `first` is in flight
            one.cancel()
        last = asyncio.ensure_future(labeller.label(["Stays."], rots=True))
        await asyncio.sleep(0.01)
        gate.open.set()
        assert (await last).label
        assert all(one.cancelled() for one in (first, *others))

    asyncio.run(run())
    assert gate.batches == [["Held."], ["Stays."]]
    assert labeller.counts["dropped"] == before + 3


def test_no_rots_are_written_for_a_caller_that_left(canary, labeller, monkeypatch):
    """Oracle: the generations that were sent."""
    turns = next(t for t in DIALOGUES if canary.chirp(t).label != "__casual__")
    writes = []
    work = labeller._works[1]
    write, choices = work.write, work.choices
    monkeypatch.setattr(work, "write", lambda *args: writes.append(1) or write(*args))
    reading, left = threading.Event(), threading.Event()

    def slow(*args):
        reading.set()
        assert left.wait(20)
        return choices(*args)

    monkeypatch.setattr(work, "choices", slow)

    async def run():
        one = asyncio.ensure_future(labeller.label(turns, rots=True))
        while not reading.is_set():
            await asyncio.sleep(0.001)
        one.cancel()
        await asyncio.sleep(0.01)
        left.set()
        await labeller.label(["Hi!"], rots=False)  # after that batch

    asyncio.run(run())
    assert writes == []


def test_a_full_queue_refuses_at_once(labeller, monkeypatch):
    """Property: `max_queue` dialogues wait, one more is refused, and the others are answered."""
    gate = Gate(labeller, monkeypatch)

    async def run():
        first, others = await fill(labeller, gate, ["Waits."], labeller.max_queue)
        with pytest.raises(QueueFull, match="8 dialogues wait"):
            await labeller.label(["Too many."], rots=False)
        assert labeller.queued == labeller.max_queue
        gate.open.set()
        assert len({chirp.label for chirp in await asyncio.gather(*others)}) == 1
        await first

    asyncio.run(run())


def test_a_failing_batch_fails_its_callers_alone(labeller, monkeypatch):
    """Property: its callers get the error, and the next caller an answer."""
    with monkeypatch.context() as patch:
        gate = Gate(labeller, patch, MemoryError("no room"))
        gate.open.set()
        (error,) = gather(labeller.label(["Bad luck."], rots=True))
        assert isinstance(error, MemoryError)
    (chirp,) = gather(labeller.label(["Good luck."], rots=True))
    assert chirp.label


@pytest.mark.parametrize("turns", [[], [""], ["Hi!", " "], "Hi!", [["Hi!"]], ["\ud800"]])
def test_what_is_no_dialogue_is_refused(labeller, turns):
    """UserError, before it reaches the queue."""
    (error,) = gather(labeller.label(turns, rots=False))
    assert isinstance(error, UserError)


def test_a_closed_labeller_answers_nobody(canary, monkeypatch):
    """Property: who waits and who comes gets an error; the thread has ended."""
    made = Labeller(canary, batch_sizes=(1,))
    (error,) = gather(made.label(["Early."], rots=False))
    assert "warm_up" in str(error)
    made.warm_up()
    gate = Gate(made, monkeypatch)

    async def run():
        first, others = await fill(made, gate, ["Waits."], 2)
        closing = asyncio.ensure_future(asyncio.to_thread(made.close))
        for one in others:
            with pytest.raises(RuntimeError, match="closed"):
                await one
        gate.open.set()
        assert (await first).label  # the batch in flight is finished
        await closing
        with pytest.raises(RuntimeError, match="closed"):
            await made.label(["Late."], rots=False)

    asyncio.run(run())
    assert not made._thread.is_alive()


def test_padded_lengths():
    """Oracle: by hand. Property: a dialogue of 64 tokens or more is padded by less than a third."""
    assert padded_lengths(20) == (20,)
    assert padded_lengths(48) == (32, 48)
    lengths = padded_lengths(512)
    assert lengths[:7] == (32, 48, 64, 80, 96, 128, 160) and lengths[-1] == 512
    steps = itertools.pairwise(lengths)
    assert all(low < high <= 1.334 * low for low, high in steps if low >= 64)


@pytest.mark.parametrize(
    ("score", "warned"), [(math.log(0.19), False), (math.log(0.05), True), (-90.0, True)]
)
def test_a_model_that_writes_no_labels_is_told(labeller, monkeypatch, caplog, score, warned):
    """Oracle: the sum of the five probabilities, by hand: 0.95, 0.25 and nearly 0."""
    work = labeller._works[1]
    answer = Answer(None, scores=(score,) * 5)
    monkeypatch.setattr(work, "choices", lambda group, read: [answer])
    with caplog.at_level(logging.WARNING, "canary"):
        labeller._check_labels()
    assert ("Its labels mean nothing" in caplog.text) == warned


def test_random_weights_are_told_at_the_start(canary, caplog):
    """Property: random weights write no labels, and `warm_up` says so."""
    made = Labeller(canary, batch_sizes=(1,))
    with caplog.at_level(logging.WARNING, "canary"):
        made.warm_up(rots=False)
    made.close()
    assert "Its labels mean nothing" in caplog.text
