"""Run many records at once: each is a generator that yields requests and is sent the answers.

Each stage gets its own answers, and `outputs` restores the order. So the output depends on the
input, the seed and the answers alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from cosmo.engine.base.errors import UserError
from data_pipeline.calls.gateway import Gateway, RequestError
from data_pipeline.calls.limits import ClosedError
from data_pipeline.calls.outputs import Outputs, Result
from data_pipeline.calls.requests import Rejected, Stage

log = logging.getLogger("data_pipeline")

MAX_RECORDS_AHEAD = 4096  # records begun after the oldest unfinished one; results wait in memory
# More records are begun than calls may be in flight, so that the places are in use while some
# records wait for a retry.
RECORDS_PER_CALL = 4
TICK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Work:
    """One record to make.

    `position` counts the input. `start` returns the generator that makes the record, and `result`
    the lines to write of it.
    """

    id: str
    position: int
    start: Callable[[], Stage]
    result: Callable[[Any, int], Result]


def rejection(rejected: Rejected, position: int) -> Result:
    """Return a line of rejected.jsonl: position in the input, id, stage, reason, known fields."""
    row = {"position": position, "id": rejected.id}
    row |= {"stage": rejected.stage, "reason": rejected.reason}
    return Result({"rejected": json.dumps({**row, **rejected.record}, ensure_ascii=False)})


async def drive(work: Work, gateway: Gateway) -> Result:
    """Answer one generator's requests to the end; return the lines of its record or rejection.

    An error in a stage is logged and rejects the record, so that one odd answer stops no corpus.
    """
    generator = work.start()
    try:
        response = None
        while True:
            try:
                request = generator.send(response)
            except StopIteration as stop:
                result = stop.value
                if isinstance(result, Rejected):
                    return rejection(result, work.position)
                return work.result(result, work.position)
            response = await gateway.answer(request)
    except RequestError as failed:
        generator.close()
        about = {"detail": failed.detail}
        reason = f"failed: {failed.reason}"
        return rejection(Rejected(work.id, failed.request.stage, reason, about), work.position)
    except (UserError, ClosedError):
        # These stop the whole run. At once: a call that another record begins now would be paid
        # for, and lost where the journal cannot be written.
        gateway.limits.close("an error")
        raise
    except Exception as error:
        # One line a record: the full traces of a common fault would fill the log.
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        log.error("%s: %s: %s (%s)", work.id, type(error).__name__, error, where)
        gateway.counts["errors"] += 1
        about = {"detail": f"{type(error).__name__}: {error} ({where})"}
        rejected = Rejected(work.id, "error", f"error: {type(error).__name__}", about)
        return rejection(rejected, work.position)


async def run(
    work: Iterator[Work],
    gateway: Gateway,
    outputs: Outputs,
    *,
    tick: Callable[[], None] = lambda: None,
) -> str | None:
    """Do `work` from `outputs.next` on; return why it stopped early, or None if it is done.

    After SIGINT or SIGTERM no call begins, and the answers to calls in flight are journaled.
    Raises UserError, after the same waiting, if no call can succeed any more.
    """
    items = enumerate(work)
    # These records are written. Their generators are never started, so they ask nothing.
    for _ in range(outputs.next):
        next(items)
    moved = asyncio.Event()
    limits = gateway.limits
    stopped: asyncio.Future = asyncio.get_running_loop().create_future()

    async def worker() -> None:
        for number, item in items:
            while number - outputs.next >= MAX_RECORDS_AHEAD:
                moved.clear()
                await moved.wait()
            outputs.add(number, await drive(item, gateway))
            moved.set()
            # Answers from the journal never wait, so other tasks would get no turn.
            await asyncio.sleep(0)

    async def ticker() -> None:
        while True:
            tick()
            await asyncio.sleep(TICK_SECONDS)

    def stop(name: str) -> None:
        limits.close(f"stopped by {name}")
        # Both signals may arrive before their handlers are gone.
        if not stopped.done():
            stopped.set_result(None)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)  # a second signal kills

    with _signals(stop):
        side = asyncio.create_task(ticker())
        tasks = [
            asyncio.create_task(worker())
            for _ in range(limits.allowance.concurrency * RECORDS_PER_CALL)
        ]
        everything = asyncio.gather(*tasks)
        try:
            await asyncio.wait({everything, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not (everything.done() and everything.exception() is None):
                limits.close("an error")
            # Calls in flight are paid for: cancelling them now would lose their answers.
            while limits.running:
                await asyncio.sleep(0.01)
            side.cancel()
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(BaseException):
                await everything
    errors = [e for e in ended if isinstance(e, Exception)]
    # The cause, not the ClosedError of the workers that it stopped.
    worst = next((e for e in errors if not isinstance(e, ClosedError)), None)
    if worst is not None:
        with contextlib.suppress(UserError):  # a full disk fails here again, and is no news
            outputs.save()
        raise worst
    outputs.save()
    return limits.closed


@contextlib.contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, stop, number.name)
    except (ValueError, RuntimeError):  # only the main thread gets signals
        yield
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
