"""Describe the scheduler that the server needs, and read its events from an event loop.

`cosmo.engine.infer.continuous` has the scheduler; a test may give another one.
"""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cosmo.engine.web.errors import ApiError


class Handle(Protocol):
    """A request in the scheduler."""

    def cancel(self) -> None:
        """Free the slots before the next step; callable from any thread, any number of times."""


class Scheduler(Protocol):
    """The attributes that the server reads of a scheduler: see `continuous.Scheduler`."""

    active: int
    queued: int
    steps: int
    compilations: int

    def submit(
        self,
        input_ids: Sequence[int],
        samplings: Sequence[Any],
        on_event: Callable[[int, Any], None],
    ) -> Handle:
        """Begin a request; QueueFull if it must wait and the queue has no room."""

    def run_exclusive(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run a function between steps, on the thread that calls the devices."""

    def close(self, drain: bool) -> None:
        """End the thread, with `drain` after the requests in it."""


class Events:
    """The events of several submits, in the order of their coming.

    Sample s of submit k has the number k * n + s. Leaving the `with` block frees all slots.
    """

    def __init__(self, scheduler: Scheduler, deadline: float, deadline_seconds: float):
        self._scheduler, self._deadline, self._seconds = scheduler, deadline, deadline_seconds
        # It holds at most what the samples may generate: a slow client stops no step.
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._handles: list[Handle] = []

    def submit(self, input_ids: Sequence[int], samplings: Sequence[Any]) -> None:
        """Begin a request of one encoder pass. Raises QueueFull."""
        loop, first = asyncio.get_running_loop(), len(self._handles) * len(samplings)

        def on_event(sample: int, event: Any) -> None:
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, (first + sample, event))
            except RuntimeError:  # the loop has ended: nobody reads
                pass

        self._handles.append(self._scheduler.submit(input_ids, samplings, on_event))

    async def next(self) -> tuple[int, Any]:
        """Return the next (number of the sample, event). Raises ApiError at the deadline."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        return await before(self._deadline, self._seconds, self._queue.get())

    def close(self) -> None:
        """Free the slots."""
        for handle in self._handles:
            handle.cancel()


async def before(deadline: float, seconds: float, waiting: Any) -> Any:
    """Return what an awaitable gives; ApiError of status 504 at `deadline` (monotonic clock)."""
    try:
        return await asyncio.wait_for(waiting, deadline - time.monotonic())
    except TimeoutError:
        raise ApiError(
            504,
            f"the answer took longer than {seconds:g} seconds",
            "server_error",
            code="deadline_exceeded",
        ) from None
