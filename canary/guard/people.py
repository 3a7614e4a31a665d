"""Call a person: write an intervention to a queue file, and post it to a webhook.

The queue file is written before the set text answers, the webhook is called beside it. With both,
the file also gets the outcome of each call. Calls without an outcome, because of a kill, are made
again at the next start.
"""

import asyncio
import contextlib
import logging
import pathlib
import random
from collections.abc import Mapping
from typing import Any

import httpx2

from canary.guard import audit
from canary.guard.policy import Intervention
from cosmo.engine.base import json_lines

log = logging.getLogger("canary.guard")

MAX_CALLS = 64  # of the webhook at once; more wait
MAX_WAITING = 1024  # calls that wait; more are recorded as failed
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0


class People:
    """The ways to a person: a queue file, a webhook, both, or neither."""

    def __init__(
        self,
        settings: Intervention,
        queue: str | pathlib.Path | None = None,
        *,
        backoff_seconds: float = FIRST_BACKOFF_SECONDS,
    ):
        """Open the queue file. Raises UserError."""
        self.settings, self.backoff_seconds = settings, backoff_seconds
        self._unsent = unsent(audit.read_lines(queue)) if queue and settings.webhook else []
        self._queue: audit.Log = audit.LineLog(queue) if queue else audit.NoLog()
        self._calls: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(MAX_CALLS)
        self._client: httpx2.AsyncClient | None = None
        if settings.webhook:
            # The environment's proxies are for others: the record goes to this address alone.
            self._client = httpx2.AsyncClient(timeout=settings.webhook_seconds, trust_env=False)

    async def start(self) -> None:
        """Make the calls that an earlier process was to make."""
        for record in self._unsent:
            # However many: they are in memory already, and an outcome would be their end.
            self._begin(record, True)
        self._unsent = []

    async def call(self, record: Mapping[str, Any]) -> None:
        """Write the record to the queue file, then begin to call the webhook. Raises OSError."""
        await self._queue.write({"kind": "intervention", **record})
        if self.settings.webhook:
            fits = len(self._calls) < MAX_WAITING
            self._begin({"kind": "intervention", **record}, fits)

    def _begin(self, record: Mapping[str, Any], fits: bool) -> None:
        call = asyncio.ensure_future(self._call(record, fits))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _call(self, record: Mapping[str, Any], fits: bool) -> None:
        problem, tries = "too many calls wait", 0
        while fits and problem and tries < self.settings.webhook_tries:
            if tries:
                most = min(self.backoff_seconds * 2 ** (tries - 1), MAX_BACKOFF_SECONDS)
                await asyncio.sleep(random.uniform(most / 2, most))
            tries += 1
            async with self._places:
                problem = await self._post(record)
        if problem:
            log.warning("webhook: intervention %s not delivered: %s", record["request"], problem)
        outcome = {"kind": "webhook", "request": record["request"], "delivered": not problem}
        outcome |= {"tries": tries, "problem": problem or None}
        with contextlib.suppress(OSError):  # the disk is full: the log above has it
            await self._queue.write(outcome)

    async def _post(self, record: Mapping[str, Any]) -> str:
        """Return "" if the webhook took the record, else the problem."""
        assert self._client is not None
        headers = {"content-type": "application/json", "idempotency-key": str(record["request"])}
        try:
            async with asyncio.timeout(self.settings.webhook_seconds):
                async with self._client.stream(
                    "POST",
                    self.settings.webhook,
                    content=json_lines.line(record),
                    headers=headers,
                ) as answer:
                    # A redirect is not followed: the policy allows this address alone.
                    return "" if answer.is_success else f"status {answer.status_code}"
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError) as error:
            return type(error).__name__

    async def close(self, seconds: float = 5.0) -> None:
        """Wait a while for calls in flight, and close. Unfinished calls stay in the queue."""
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=seconds)
        for call in set(self._calls):
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
        if self._client is not None:
            await self._client.aclose()
        await self._queue.close()


def unsent(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the interventions of a queue file whose webhook has no outcome."""
    ended = {record.get("request") for record in records if record.get("kind") == "webhook"}
    return [
        record
        for record in records
        if record.get("kind") == "intervention" and record.get("request") not in ended
    ]
