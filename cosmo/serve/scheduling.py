"""Read the events of the scheduler, which come from its threads, in an event loop."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from cosmo.engine.infer import ctranslate2_scheduler
from cosmo.engine.infer.continuous import Handle, Sampling, Scheduler
from cosmo.engine.web.errors import ApiError


class Events:
    """The events of several submits, in the order of their coming.

    Sample s of submit k has the number k * n + s. Leaving the `with` block frees all slots.
    """

    def __init__(
        self,
        scheduler: Scheduler | ctranslate2_scheduler.Scheduler,
        deadline: float,
        deadline_seconds: float,
    ):
        self._scheduler, self._deadline, self._seconds = scheduler, deadline, deadline_seconds
        # It holds at most what the samples may generate: a slow client stops no step.
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._n = 1

    def submit(self, input_ids: Sequence[int], samplings: Sequence[Sampling]) -> None:
        """Begin a request of one encoder pass. Raises QueueFull."""
        loop, self._n = asyncio.get_running_loop(), len(samplings)
        first = len(self._handles) * self._n

        def on_event(sample: int, event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads
                loop.call_soon_threadsafe(self._queue.put_nowait, (first + sample, event))

        self._handles.append(self._scheduler.submit(input_ids, samplings, on_event))

    async def next(self) -> tuple[int, Any]:
        """Return the next (number of the sample, event). Raises ApiError at the deadline."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        return await before(self._deadline, self._seconds, self._queue.get())

    def end(self, number: int) -> None:
        """Free the slot of one sample."""
        self._handles[number // self._n].cancel(number % self._n)

    def close(self) -> None:
        """Free the slots."""
        for handle in self._handles:
            handle.cancel()


async def before(deadline: float, seconds: float, waiting: Any) -> Any:
    """Return what an awaitable gives; ApiError of status 504 at `deadline` (monotonic clock)."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await waiting
    except TimeoutError:
        raise ApiError(
            504,
            f"the answer took longer than {seconds:g} seconds",
            "server_error",
            code="deadline_exceeded",
        ) from None
