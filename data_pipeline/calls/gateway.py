"""Answer the requests of stages: from the journal, or from the server with retries.

An answer is in the journal before the stage gets it. A request that no try could answer is recorded
as a failure, which the next start asks again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.retries import RetryPolicy
from data_pipeline.calls import client as clients
from data_pipeline.calls.client import AnswerError, Reply, Server
from data_pipeline.calls.journal import Entry, Journal
from data_pipeline.calls.limits import BYTES_PER_TOKEN, Call, Limits, max_tokens, used_tokens
from data_pipeline.calls.requests import Request, Response

log = logging.getLogger("data_pipeline")

Post = Callable[[str, bytes], Awaitable[Reply]]
MAX_REFUSED_IN_A_ROW = 20  # refusals (3xx, 4xx) without one answer: the settings are wrong
MAX_FAILED_IN_A_ROW = 20  # calls without an answer, and one request out of tries: a dead server
MAX_UNREADABLE_IN_A_ROW = 20  # paid replies of a stage without one answer: no later one has it
MAX_PAUSE_SECONDS = 600.0  # a longer Retry-After is cut to this
OVERLOADED_STATUS = (429, 503)  # fewer calls in flight may help


class RequestError(Exception):
    """No try could answer a request; its triple is rejected."""

    def __init__(self, request: Request, reason: str, detail: str):
        super().__init__(f"{request.record_id}, {request.stage}: {reason}: {detail}")
        self.request, self.reason, self.detail = request, reason, detail


class Gateway:
    """Answers requests. `post(form, body)` sends one and returns the reply."""

    def __init__(
        self,
        post: Post,
        server: Server,
        journal: Journal,
        limits: Limits,
        policy: RetryPolicy = RetryPolicy(),
        moderation: tuple[Post, Server] | None = None,
    ):
        self.journal, self.limits, self.policy = journal, limits, policy
        self.servers = {"model": (post, server)}
        if moderation:
            self.servers["moderation"] = moderation
        # This start's calls, answers from the journal and retries by reason; answers by stage.
        self.counts: Counter = Counter()
        self.stages: Counter = Counter()
        self._failed_in_a_row = 0
        self._refused_in_a_row = 0
        # By stage, because the answers of another stage may be readable.
        self._unreadable_in_a_row: Counter = Counter()
        self._random = random.Random()  # of waiting times alone: no answer depends on it
        # The body's fields may allow an answer more tokens than the stage asks for.
        self._body_tokens = {name: _most(one.extra_body) for name, (_, one) in self.servers.items()}

    async def answer(self, request: Request) -> Response:
        """Return the answer, from the journal or the server.

        Raises RequestError, limits.ClosedError, or UserError if nothing can succeed any more.
        """
        moderation = request.stage == "moderation"
        if moderation and "moderation" not in self.servers:
            raise UserError("a stage asks for moderation: give a service", setting="moderation_url")
        post, server = self.servers["moderation" if moderation else "model"]
        form = "moderation" if moderation else server.form
        key = request.key(server.model, form, "{}" if moderation else server.extra_body)
        known = self.journal.get(key)
        if known is not None:
            # An answer that another version read, and this one cannot, is asked for again.
            with contextlib.suppress(AnswerError):
                response = clients.parse_answer(known.raw, form)
                self.counts["replayed"] += 1
                return response
        # A seed made of the key: another attempt has another key, so it gets another answer.
        data = clients.request_body(request, server, seed=int(key[:7], 16))
        charged = self._charged(request, moderation)
        most = max_tokens(charged)
        for tried in range(1, self.policy.tries + 1):
            async with self.limits.slot(charged) as call:
                # Before the call, so that a kill cannot hide what it costs.
                number = self.journal.begin(_entry(key, request, "", "", Call(0, *most)))
                # Kept if the call is cancelled, because the server may have been asked.
                call.prompt_tokens, call.completion_tokens = most
                call.estimated = True
                reply = await post(form, data)
                self.counts["calls"] += 1
                if reply.status == 200:
                    self.limits.concurrency.answered()
                elif reply.status in OVERLOADED_STATUS:
                    self.limits.concurrency.overloaded(call.number)
                response, reason, fault = _judge(reply, form)
                if response is not None:
                    tokens_in, tokens_out, ours = used_tokens(charged, response)
                    call.prompt_tokens, call.completion_tokens = tokens_in, tokens_out
                    call.estimated = ours
                    note = self._note_estimate(server) if ours else ""
                    entry = _entry(key, request, "answer", reply.text, call, note)
                elif reply.billed:  # no answer, but it may have been paid for
                    entry = _entry(key, request, "failure", reply.text, call, reason)
                else:
                    call.prompt_tokens = call.completion_tokens = 0
                    entry = None
                self.journal.end(number, entry)
            self._check_readable(reply, response, fault, charged, server)
            if entry is not None:  # paid for: on the disk before a stage uses it
                await self.journal.sync()
            if response is not None:
                self._failed_in_a_row = 0
                self.stages[request.stage] += 1
                self._refused_in_a_row = 0
                return response
            self._failed_in_a_row += reason in ("no answer", "server error")
            self._check_final(reply, server)
            # The same request would be refused again.
            if reason == "refused":
                break
            self.counts[f"retried: {reason}"] += 1
            await self._pause(reply, tried)
        # People read the failures; no stage ever gets one.
        if not reply.billed:
            note = f"{reason} ({reply.status})"
            self.journal.append(_entry(key, request, "failure", reply.text, Call(), note))
        # All calls in flight fail together in one outage, so the bound grows with their number.
        if self._failed_in_a_row >= max(MAX_FAILED_IN_A_ROW, 2 * self.limits.allowance.concurrency):
            raise UserError(
                f"{server.address} answers no call: {self._failed_in_a_row} in a row failed "
                f"({_short(reply)}). All earlier answers are kept: check the server, then give the "
                "same command again"
            )
        raise RequestError(request, reason, _short(reply))

    def _charged(self, request: Request, moderation: bool) -> Request:
        """Return the request with the most tokens of an answer that the body's fields allow."""
        most = self._body_tokens["moderation" if moderation else "model"]
        if most is None:
            return request
        sampling = dataclasses.replace(request.sampling, max_tokens=most)
        return dataclasses.replace(request, sampling=sampling)

    def _note_estimate(self, server: Server) -> str:
        """Count an answer whose tokens are our own estimate, and log that once."""
        if not self.counts["estimated"]:
            log.warning(
                "%s gives no possible count of tokens (usage): caps, cost and report count %d "
                "bytes of text as a token",
                server.address,
                BYTES_PER_TOKEN,
            )
        self.counts["estimated"] += 1
        return "tokens estimated"

    def _check_readable(
        self, reply: Reply, response: Response | None, fault: str, request: Request, server: Server
    ) -> None:
        """Raise UserError if a stage got many paid replies in a row, and no answer in them."""
        if reply.status != 200:
            return
        if response is not None and not response.fault:
            self._unreadable_in_a_row[request.stage] = 0
            return
        self._unreadable_in_a_row[request.stage] += 1
        count = self._unreadable_in_a_row[request.stage]
        if count < MAX_UNREADABLE_IN_A_ROW:
            return
        where = f"{server.address}: {count} replies in a row to {request.stage!r}"
        end = "All answers are kept: give the same command again after that"
        if response is None:
            raise UserError(
                f"{where} cannot be read ({fault}), the last is {_short(reply)!r}. Correct the "
                f"address or the server. {end}"
            )
        # A stop sequence may end the reasoning: "stop" goes, as null takes a field away.
        room = {"max_tokens": 4096} | ({"stop": None} if request.sampling.stop else {})
        raise UserError(
            f"{where} have no answer: {response.fault} (max_tokens="
            f"{request.sampling.max_tokens}). Switch the model's reasoning off, or add fields that "
            f"give it room, such as {json.dumps(room)}. {end}",
            setting="body",
        )

    def _check_final(self, reply: Reply, server: Server) -> None:
        """Raise UserError if this reply means that no call can succeed."""
        self._refused_in_a_row = self._refused_in_a_row + 1 if clients.is_refused(reply) else 0
        if clients.is_final(reply) or self._refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise clients.refusal(reply, server)

    async def _pause(self, reply: Reply, tried: int) -> None:
        """Wait before the next try. A Retry-After holds every call, not this one alone."""
        wait = self.policy.wait(tried, self._random)
        if reply.retry_after is not None:
            self.limits.pause(min(reply.retry_after, MAX_PAUSE_SECONDS))
        elif reply.status == 429 and self.limits.concurrency.allowed <= 1:
            # One call in flight is too many: the server limits calls in a time, not at once.
            self.limits.pause(wait)
        if tried < self.policy.tries:
            await self.limits.sleep(wait)


def _judge(reply: Reply, form: str) -> tuple[Response | None, str, str]:
    """Return (response, "", ""), or (None, what is wrong with the reply, why it is unreadable)."""
    if reply.status == 200:
        try:
            return clients.parse_answer(reply.text, form), "", ""
        except AnswerError as error:
            return None, "broken answer", str(error)
    if reply.status in (0, 429):
        return None, "no answer" if reply.status == 0 else "too many requests", ""
    return None, "refused" if clients.is_refused(reply) else "server error", ""


def _entry(key: str, request: Request, kind: str, raw: str, call: Call, reason: str = "") -> Entry:
    return Entry(
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


def _most(body: str) -> int | None:
    """Return the most tokens of an answer by the fields that the user adds to each request."""
    fields = json.loads(body)
    given = [fields.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return max((n for n in given if isinstance(n, int) and n > 0), default=None)


def _short(reply: Reply) -> str:
    # It is printed and written down, so no half of a surrogate pair may be in it.
    text = " ".join(reply.text.split())[:200].encode("utf-8", "replace").decode()
    return f"{reply.status} " * bool(reply.status) + text
