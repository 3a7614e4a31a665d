"""Generate the answers of a request: text as it comes, log-probabilities, why an answer ended."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from cosmo.engine.web.errors import ApiError
from cosmo.serve import fields, scheduling, texts
from cosmo.serve.model import Asked, Served

# JSON has no infinity; OpenAI gives this for a token that cannot come.
_LEAST_LOGPROB = -9999.0


@dataclasses.dataclass(frozen=True)
class Delta:
    """What an answer gains. `sample` is the answer's number in its request.

    `logprobs` has an entry for each token whose text begins in `text`, None if none were asked for.
    `rots` come once, where a Prost follows rules of thumb. `finish` ends the answer.
    """

    sample: int
    text: str
    logprobs: list["TokenEntry"] | None = None
    rots: tuple[str, ...] | None = None
    finish: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """A token with its log-probability (nats), its place in the text, and the likeliest tokens."""

    piece: texts.Piece
    logprob: float
    start: int
    top: tuple[tuple[texts.Piece, float], ...]


class _Sample:
    """One answer that is being written."""

    def __init__(self, number: int, model: Served, asked: Asked, wanted: fields.Wanted):
        self.number, self.model, self.asked, self.wanted = number, model, asked, wanted
        self.writer = model.writer(asked, wanted.stops)
        self.log = texts.TokenLog()
        self.tokens = 0
        self.done = False
        # Given RoTs are known now; own ones once they are written.
        self.rots_due = model.follows_rots

    def token(self, event: Any) -> Delta | None:
        """Add a token; return what may be shown, None if nothing may."""
        vocabulary = self.model.session.vocabulary
        if event.id == vocabulary.eos_id:
            return None
        self.tokens += 1
        start = self.writer.length
        text = self.writer.add(event.id)
        if self.wanted.logprobs is not None:
            top = tuple((texts.piece(vocabulary, id), _finite(p)) for id, p in event.top)
            entry = TokenEntry(
                texts.piece(vocabulary, event.id),
                _finite(event.logprob),
                start,
                top[: self.wanted.logprobs],
            )
            self.log.add(start, entry)
        if self.writer.stopped:
            return self._delta(text, "stop")
        rots = self._rots(last=False)
        if not text and rots is None:
            return None
        return self._delta(text, None, rots)

    def end(self, reason: str) -> Delta:
        """Return the last delta."""
        text = self.writer.finish()
        # The rest may hold a stop string too.
        return self._delta(text, "stop" if self.writer.stopped else reason)

    def _delta(self, text: str, finish: str | None, rots: Any = None) -> Delta:
        entries = None
        if self.wanted.logprobs is not None:
            everything = finish is not None and not self.writer.stopped
            entries = self.log.take(None if everything else len(self.writer.shown))
        if finish is not None:
            self.done = True
            rots = self._rots(last=True) if rots is None else rots
        return Delta(self.number, text, entries, rots, finish)

    def _rots(self, last: bool) -> tuple[str, ...] | None:
        """Return the RoTs if they are known and were not given out yet."""
        if not self.rots_due:
            return None
        found: tuple[str, ...] | None = self.asked.rots
        if isinstance(self.writer, texts.ProstWriter):
            found = self.writer.rots()
        if found is None and last:
            found = ()
        self.rots_due = found is None
        return found


def _finite(logprob: float) -> float:
    return max(float(logprob), _LEAST_LOGPROB)


@dataclasses.dataclass
class Usage:
    """Counts of a request's tokens: those that the model read, and those that it wrote."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        """Return OpenAI's `usage`."""
        total = self.prompt_tokens + self.completion_tokens
        return {**dataclasses.asdict(self), "total_tokens": total}


class Request:
    """A request that the scheduler has accepted: its answers and their counts.

    Make it by `begin` or `begin_search`. `deltas` gives the answers; leaving it early frees the
    slots.
    """

    def __init__(self, model: Served, wanted: fields.Wanted, asked: Sequence[Asked]):
        self.wanted = wanted
        self.usage = Usage(sum(len(one.input_ids) for one in asked))
        self.cut = any(one.cut for one in asked)
        self.samples = [
            _Sample(place * wanted.n + number, model, one, wanted)
            for place, one in enumerate(asked)
            for number in range(wanted.n)
        ]
        self._events: scheduling.Events | None = None
        self._search: Any = None
        self.began = time.monotonic()
        self.on_first_token: Callable[[float], None] = lambda seconds: None

    def begin(self, events: scheduling.Events, model: Served) -> None:
        """Send all prompts to the scheduler. Raises QueueFull, and then none is left in it."""
        self._events = events
        try:
            for sample in self.samples[:: self.wanted.n]:
                ids = sample.asked.input_ids
                events.submit(ids, model.samplings(self.wanted, sample.asked))
        except BaseException:
            events.close()
            raise

    def begin_search(self, found: Any) -> None:
        """Take the answers from a search: an awaitable of lists of token ids, the best first."""
        self._search = found

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the answers' text as it comes; each answer ends with a delta that has `finish`."""
        if self._search is not None:
            for delta in self._searched(await self._search):
                yield delta
            return
        assert self._events is not None
        left, first = len(self.samples), True
        try:
            while left:
                number, event = await self._events.next()
                sample = self.samples[number]
                if sample.done:  # it has met a stop string
                    continue
                reason = getattr(event, "reason", None)
                if reason is None:
                    if first:
                        first = False
                        self.on_first_token(time.monotonic() - self.began)
                    delta = sample.token(event)
                elif reason in ("stop", "length"):
                    delta = sample.end(reason)
                else:
                    raise _failed(event)
                if delta is not None:
                    left -= sample.done
                    if sample.done and reason is None:  # a stop string, which no step knows of
                        self._events.end(number)
                    self.usage.completion_tokens = sum(one.tokens for one in self.samples)
                    yield delta
        finally:
            self._events.close()

    def _searched(self, found: Sequence[Sequence[int]]):
        for sample, ids in zip(self.samples, found, strict=False):
            eos = sample.model.session.vocabulary.eos_id
            for id in ids:
                if id == eos or sample.done:
                    break
                delta = sample.token(_Found(id))
                self.usage.completion_tokens = sum(one.tokens for one in self.samples)
                if delta is not None:
                    yield delta
            if not sample.done:
                yield sample.end("stop" if eos in ids else "length")

    def close(self) -> None:
        """Free the slots, also if `deltas` was never read."""
        if self._events is not None:
            self._events.close()


@dataclasses.dataclass(frozen=True)
class _Found:
    """A token of a search, which gives no log-probability of it."""

    id: int
    logprob: float = 0.0
    top: tuple = ()


def _failed(event: Any) -> ApiError:
    if event.reason == "cancelled":
        return ApiError(503, "the server is stopping", "server_error", code="unavailable")
    return ApiError(500, "the model failed; the server's log has the reason", "server_error")


@dataclasses.dataclass
class Whole:
    """An answer that has ended."""

    text: str = ""
    logprobs: list[TokenEntry] = dataclasses.field(default_factory=list)
    rots: tuple[str, ...] | None = None
    finish: str = "stop"


async def whole(request: Request) -> list[Whole]:
    """Return all answers of a request."""
    found = [Whole() for _ in request.samples]
    async for delta in request.deltas():
        one = found[delta.sample]
        one.text += delta.text
        one.logprobs += delta.logprobs or []
        one.rots = delta.rots if delta.rots is not None else one.rots
        one.finish = delta.finish or one.finish
    return found


async def unless_left(waiting: Any, left: Any) -> Any:
    """Return what `waiting` gives; cancel it and raise CancelledError once `left` ends."""
    task, watch = asyncio.ensure_future(waiting), asyncio.ensure_future(left)
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                await asyncio.gather(one, return_exceptions=True)


class ClientLeftError(Exception):
    """The client has closed its connection before its answer."""
