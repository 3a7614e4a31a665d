"""From a stage's question to its answer: the journal first, then the server, again if need be.

An answer is in the journal before the stage sees it. What cannot be had after all tries is
recorded as a failure, which the next start asks anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from data_pipeline import client as clients
from data_pipeline.client import AnswerError, Reply, Server
from data_pipeline.errors import UserError
from data_pipeline.journal import Entry, Journal
from data_pipeline.limits import Call, Limits, most_tokens
from data_pipeline.requests import Request, Response

log = logging.getLogger("data_pipeline")

Post = Callable[[str, bytes], Awaitable[Reply]]
REFUSED_IN_A_ROW = 20  # so many refusals (3xx, 4xx) without one answer: the settings are wrong
SILENT_IN_A_ROW = 20  # so many errors, and one request at the end of its tries: the server is gone


class RequestError(Exception):
    """A request that no try could answer; the triple is rejected for it."""

    def __init__(self, request: Request, reason: str, detail: str):
        super().__init__(f"{request.record_id}, {request.stage}: {reason}: {detail}")
        self.request, self.reason, self.detail = request, reason, detail


@dataclasses.dataclass(frozen=True)
class Patience:
    """How often and after how long a call is made again: full jitter under a doubling limit."""

    tries: int = 8
    first_seconds: float = 0.5
    most_seconds: float = 30.0

    def wait(self, tried: int, chance: random.Random) -> float:
        """Seconds before the try after `tried` of them."""
        return chance.uniform(0, min(self.most_seconds, self.first_seconds * 2 ** (tried - 1)))


class Asker:
    """Answers requests. `post` sends one (of a form) and gives what comes back."""

    def __init__(
        self,
        post: Post,
        server: Server,
        journal: Journal,
        limits: Limits,
        patience: Patience = Patience(),
        moderation: tuple[Post, Server] | None = None,
    ):
        self.journal, self.limits, self.patience = journal, limits, patience
        self.ways = {"model": (post, server)}
        if moderation:
            self.ways["moderation"] = moderation
        self.counts: Counter = Counter()  # calls, replayed, retries by reason, of this start
        self.stages: Counter = Counter()  # answers by stage, of this start
        self._silent = 0  # calls in a row that the server did not answer
        self._refused = 0
        self._chance = random.Random()  # of waiting times only: no answer depends on it

    async def ask(self, request: Request) -> Response:
        """The answer, from the journal or the server.

        Raises RequestError, limits.ClosedError, or UserError if nothing can succeed any more.
        """
        moderation = request.stage == "moderation"
        if moderation and "moderation" not in self.ways:
            raise UserError("a moderation is asked for, and there is no --moderation_url")
        post, server = self.ways["moderation" if moderation else "model"]
        form = "moderation" if moderation else server.form
        key = request.key(server.model, form, "{}" if moderation else server.extra_body)
        known = self.journal.get(key)
        if known is not None:
            with contextlib.suppress(AnswerError):  # of a version that read it otherwise
                response = clients.read(known.raw, form)
                self.counts["replayed"] += 1
                return response
        data = clients.body(request, server, seed=int(key[:7], 16))
        for tried in range(1, self.patience.tries + 1):
            async with self.limits.slot(request) as call:
                reply = await post(form, data)
                self.counts["calls"] += 1
                response, reason = _judge(reply, form)
                if response is not None:
                    call.prompt_tokens = response.prompt_tokens
                    call.completion_tokens = response.completion_tokens
                    self._keep(key, request, "answer", reply.text, call)
                elif reply.billed:  # no answer, but it may have been paid for
                    call.prompt_tokens, call.completion_tokens = most_tokens(request)
                    call.estimated = True
                    self._keep(key, request, "failure", reply.text, call, reason)
            if response is not None:
                self._silent = 0
                self.stages[request.stage] += 1
                self._refused = 0
                return response
            self._silent += reason in ("no answer", "server error")
            self._consider(reply, server)
            if reason == "refused":
                break
            self.counts[f"retried: {reason}"] += 1
            await self._pause(reply, tried)
        if not reply.billed:
            self._keep(key, request, "failure", reply.text, Call(), f"{reason} ({reply.status})")
        if self._silent >= max(SILENT_IN_A_ROW, 2 * self.limits.allowance.concurrency):
            raise UserError(
                f"{server.address} answers nobody: {self._silent} calls in a row failed "
                f"({_short(reply)}). All answers until then are kept: see to the server, and give "
                "the same command again"
            )
        raise RequestError(request, reason, _short(reply))

    def _keep(
        self,
        key: str,
        request: Request,
        kind: str,
        raw: str,
        call: Call,
        reason: str = "",
    ) -> None:
        self.journal.append(
            Entry(
                key=key,
                id=request.record_id,
                stage=request.stage,
                attempt=request.attempt,
                kind=kind,
                raw=raw,
                prompt_tokens=call.prompt_tokens,
                completion_tokens=call.completion_tokens,
                reason=reason,
            )
        )

    def _consider(self, reply: Reply, server: Server) -> None:
        """Raise UserError if this reply means that no call can succeed."""
        self._refused = self._refused + 1 if clients.refused(reply) else 0
        if clients.hopeless(reply) or self._refused >= REFUSED_IN_A_ROW:
            raise UserError(clients.complaint(reply, server))

    async def _pause(self, reply: Reply, tried: int) -> None:
        """Wait before the next try. Too many requests, or an overload, slow everybody."""
        wait = self.patience.wait(tried, self._chance)
        if reply.retry_after is not None:
            self.limits.pause(min(reply.retry_after, 600))
        elif reply.status == 429:
            self.limits.pause(wait)
        if tried < self.patience.tries:
            await self.limits.sleep(wait)


def _judge(reply: Reply, form: str) -> tuple[Response | None, str]:
    """The response of a reply, or None and what is wrong with it."""
    if reply.status == 0:
        return None, "no answer"
    if reply.status == 429:
        return None, "too many requests"
    if reply.status >= 500:
        return None, "server error"
    if reply.status != 200:
        return None, "refused" if clients.refused(reply) else "server error"
    try:
        return clients.read(reply.text, form), ""
    except AnswerError:
        return None, "broken answer"


def _short(reply: Reply) -> str:
    return f"{reply.status} " * bool(reply.status) + " ".join(reply.text.split())[:200]
