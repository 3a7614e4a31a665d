"""A run: many triples at once, each a generator that asks and is answered, in any order.

Triples are read as they are needed; so many are under way that the allowed calls at once are
always used, though some wait to try again. What is written depends on the input, the seed and the
answers alone: each stage sees its own answers, and results are put back in order (`outputs`).
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

from data_pipeline.errors import UserError
from data_pipeline.gateway import Gateway, RequestError
from data_pipeline.limits import ClosedError
from data_pipeline.outputs import Outputs, Result
from data_pipeline.requests import Rejected, Stage

log = logging.getLogger("data_pipeline")

WINDOW = 4096  # so many triples may be done or under way ahead of the oldest unfinished one
AHEAD = 4  # triples under way for each call at once


@dataclasses.dataclass(frozen=True)
class Work:
    """One triple: its id and its place in the input, the generator that makes its record, and what
    to write of a record."""

    id: str
    position: int
    start: Callable[[], Stage]
    result: Callable[[Any, int], Result]


def rejection(rejected: Rejected, position: int) -> Result:
    """What is written of a rejection."""
    return Result({"rejected": rejected_line(rejected, position)})


def rejected_line(rejected: Rejected, position: int) -> str:
    """A line of rejected.jsonl: position in the input, id, stage, reason; what is known of it."""
    row = {"position": position, "id": rejected.id}
    row |= {"stage": rejected.stage, "reason": rejected.reason}
    return json.dumps({**row, **rejected.record}, ensure_ascii=False)


async def drive(work: Work, gateway: Gateway) -> Result:
    """Answer one triple's questions to the end; what to write of its record, or of its rejection.

    An error in a stage rejects the triple, and is said: one odd answer stops no corpus.
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
        raise
    except Exception as error:
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
    window: int = WINDOW,
    tick: Callable[[], None] = lambda: None,
) -> str | None:
    """Work off `work` from where `outputs` stands; why it stopped early, or None if it is done.

    SIGINT and SIGTERM stop it: no new call begins, the running ones are waited for and kept.
    Raises UserError, after the same waiting, if nothing can succeed any more.
    """
    items = enumerate(work)
    for _ in range(outputs.next):
        next(items)
    moved = asyncio.Event()
    limits = gateway.limits
    stopped: asyncio.Future = asyncio.get_running_loop().create_future()

    async def worker() -> None:
        for number, item in items:
            while number - outputs.next >= window:
                moved.clear()
                await moved.wait()
            outputs.add(number, await drive(item, gateway))
            moved.set()
            await asyncio.sleep(0)  # answers from the journal alone would let nobody else in

    async def ticker() -> None:
        while True:
            tick()
            await asyncio.sleep(0.5)

    def stop(name: str) -> None:
        limits.close(f"stopped by {name}")
        if not stopped.done():
            stopped.set_result(None)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)  # the next one kills

    with _signals(stop):
        side = asyncio.create_task(ticker())
        tasks = [asyncio.create_task(worker()) for _ in range(limits.allowance.concurrency * AHEAD)]
        everything = asyncio.gather(*tasks)
        try:
            await asyncio.wait({everything, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not (everything.done() and everything.exception() is None):
                limits.close("an error")
            while limits.running:  # these answers are paid for
                await asyncio.sleep(0.01)
            side.cancel()
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(BaseException):
                await everything
    outputs.save()
    errors = [e for e in ended if isinstance(e, Exception)]
    worst = next((e for e in errors if not isinstance(e, ClosedError)), None)
    if worst is not None:
        raise worst
    return limits.closed


@contextlib.contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, stop, number.name)
    except (ValueError, RuntimeError):  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
