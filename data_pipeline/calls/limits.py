"""Limit the calls: those in flight, rates a minute, caps on tokens and on cost.

The tokens of an answer are not known before it comes. A rate counts the mean of its stage, and
corrects it afterwards. A cap counts the most that the answer may have, so that no cap is passed. A
call that may have been billed, but whose answer cannot be read, is charged that most. The server's
counts are used where they are possible, else our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

from data_pipeline.calls.requests import Request, Response

# English has 4 letters a token and Chinese a character, so this estimate is seldom too low.
BYTES_PER_TOKEN = 3
# A server's count beyond our own by more than this is none: a template, a system prompt and hidden
# reasoning take fewer tokens.
MAX_HIDDEN_TOKENS = 200_000
# No text has so few tokens, so a lower count than this is none either.
MAX_BYTES_PER_TOKEN = 64


class ClosedError(Exception):
    """No further call may begin: a cap is reached, or the run is to stop.

    Calls in flight end, and their answers are journaled.
    """


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Limits that the user sets; None is no limit. Prices are for a million tokens."""

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    token_cap: int | None = None
    cost_cap: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the cost of tokens, in the currency of the prices."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


class Bucket:
    """A token bucket: `per_minute` units flow in, and one second's worth may be saved up.

    It may be overdrawn: each caller gets the seconds to wait, first come first served.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.rate = per_minute / 60
        self.most = max(self.rate, 1.0)
        self.level = self.most
        self.clock, self.then = clock, clock()

    def take(self, amount: float) -> float:
        """Take `amount`, which may overdraw; return the seconds to wait before using it."""
        now = self.clock()
        self.level = min(self.most, self.level + (now - self.then) * self.rate)
        self.then = now
        self.level -= amount
        return max(0.0, -self.level / self.rate)


class Concurrency:
    """How many calls may be in flight: additive increase, multiplicative decrease, as in TCP.

    It begins at `most`, because most servers queue what they cannot serve at once.
    """

    def __init__(self, most: int):
        self.most = self.least = most  # the bound, and the fewest that were allowed so far
        self.allowed = float(most)
        self.decreases = 0
        self._places = most  # those taken and those free
        self._free = asyncio.Semaphore(most)
        self._begun = self._decreased_at = 0  # number of the last call, then and at a decrease

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the places."""
        await self._free.acquire()
        try:
            yield
        finally:
            # A decrease takes places away as their calls end: those in flight are paid for.
            if self._places > int(self.allowed):
                self._places -= 1
            else:
                self._free.release()

    def begin(self) -> int:
        """Number a call that is sent now."""
        self._begun += 1
        return self._begun

    def answered(self) -> None:
        """Allow one call more for each round of calls that the server answers."""
        # With places left over, an answer does not show that the server can take more.
        if not self._free.locked():
            return
        self.allowed = min(float(self.most), self.allowed + 1 / self.allowed)
        while self._places < int(self.allowed):
            self._places += 1
            self._free.release()

    def overloaded(self, number: int) -> None:
        """Allow half as many calls: the server refused the call `number` as one too many."""
        # Calls that were sent before the last decrease do not show the limit since then. Without
        # this rule one overload, which refuses many calls at once, would end at one call.
        if number > self._decreased_at and self.allowed > 1:
            self.allowed = max(1.0, self.allowed / 2)
            self.least = min(self.least, int(self.allowed))
            self.decreases += 1
            self._decreased_at = self._begun


class Limits:
    """Hold each call back until all limits allow it.

    `spent` is (prompt tokens, completion tokens) of earlier starts, which the caps count too.
    """

    def __init__(
        self,
        allowance: Allowance,
        spent: tuple[int, int] = (0, 0),
        # Parameters, so that tests need not wait.
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = asyncio.sleep,
    ):
        self.allowance, self.clock, self.sleep = allowance, clock, sleep
        self.spent_in, self.spent_out = spent
        self.held: list[float] = [0.0, 0.0]  # the most tokens of calls under way, in and out
        self._under_way = 0
        self._settled = asyncio.Event()
        self.running = self.most_running = 0  # calls that are with the server now
        self.closed: str | None = None
        self.paused_until = 0.0
        self.concurrency = Concurrency(allowance.concurrency)
        minute = allowance.requests_per_minute
        self._requests = Bucket(minute, clock) if minute else None
        minute = allowance.tokens_per_minute
        self._tokens = Bucket(minute, clock) if minute else None
        self._means: dict[str, tuple[int, int]] = {}  # stage -> calls, completion tokens

    def close(self, reason: str) -> None:
        """Let no call begin from now on; the first reason stays."""
        self.closed = self.closed or reason
        self._settled.set()  # calls that wait for room under a cap look again

    def pause(self, seconds: float) -> None:
        """Let no call begin for so long."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def estimate(self, request: Request) -> tuple[float, float]:
        """Guess the prompt and completion tokens that a call will take."""
        calls, tokens = self._means.get(request.stage, (0, 0))
        # Before the first answer: most answers are far shorter than their limit.
        expected = tokens / calls if calls else request.sampling.max_tokens / 4
        # An English token has about 4 letters.
        return len(request.prompt) / 4, expected if request.stage != "moderation" else 0.0

    @contextlib.asynccontextmanager
    async def slot(self, request: Request) -> AsyncIterator[Call]:
        """Wait until `request` may be sent, then hold one of the places of calls in flight.

        Raises ClosedError if no further call may begin.
        """
        async with self.concurrency.place():
            most = max_tokens(request)
            # The place comes first, because the room under a cap is reserved from then on.
            await self._room(*most)
            call = Call()
            guess_in, guess_out = self.estimate(request)
            self._hold(1, *most)
            try:
                wait = self._requests.take(1) if self._requests else 0.0
                if self._tokens:
                    wait = max(wait, self._tokens.take(guess_in + guess_out))
                until = self.clock() + wait
                # In a loop, because a Retry-After may come while this call waits.
                while (now := self.clock()) < max(until, self.paused_until):
                    await self.sleep(max(until, self.paused_until) - now)
                    self._check_open()
                call.number = self.concurrency.begin()
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                try:
                    yield call
                finally:
                    self.running -= 1
            finally:
                self._settle(request, call, guess_in + guess_out)
                self._hold(-1, *most)
                self._settled.set()

    def _check_open(self) -> None:
        if self.closed is not None:
            raise ClosedError(self.closed)

    def _settle(self, request: Request, call: Call, guess: float) -> None:
        used = call.prompt_tokens + call.completion_tokens
        self.spent_in += call.prompt_tokens
        self.spent_out += call.completion_tokens
        if call.estimated:
            return  # an upper bound would distort the mean
        if self._tokens and used:
            self._tokens.take(used - guess)
        if call.completion_tokens:
            calls, tokens = self._means.get(request.stage, (0, 0))
            self._means[request.stage] = (calls + 1, tokens + call.completion_tokens)

    def _hold(self, sign: int, tokens_in: float, tokens_out: float) -> None:
        self._under_way += sign
        self.held[0] += sign * tokens_in
        self.held[1] += sign * tokens_out

    async def _room(self, most_in: float, most_out: float) -> None:
        """Wait until the caps have room for a call; close if none has, and no call is under way.

        Raises ClosedError.
        """
        self._check_open()
        while (full := self._full(most_in, most_out)) is not None:
            # Calls under way reserve the most that they may take, and often take less.
            if not self._under_way:
                self.close(full)
            self._check_open()
            self._settled.clear()
            await self._settled.wait()
        self._check_open()

    def _full(self, most_in: float, most_out: float) -> str | None:
        """Name the cap that a call might pass, and how far it is used; None if none."""
        allowance = self.allowance
        tokens_in = self.spent_in + self.held[0] + most_in
        tokens_out = self.spent_out + self.held[1] + most_out
        cap, spent = allowance.token_cap, self.spent_in + self.spent_out
        if cap is not None and tokens_in + tokens_out > cap:
            need = f"the next call may take {most_in + most_out:.0f}"
            return f"token_cap={cap} is reached ({spent} tokens used, {need})"
        cap, cost = allowance.cost_cap, allowance.cost(self.spent_in, self.spent_out)
        if cap is not None and allowance.cost(tokens_in, tokens_out) > cap:
            need = f"the next call may cost {allowance.cost(most_in, most_out):.4f}"
            return f"cost_cap={cap:g} is reached ({cost:.4f} spent, {need})"
        return None


def max_tokens(request: Request) -> tuple[int, int]:
    """Return the most tokens that a request may take, in and out."""
    if request.stage == "moderation":
        return 0, 0
    letters = max(len(request.prompt), sum(len(text) for _, text in request.messages))
    # Tokens have two letters or more, except in rare scripts.
    return -(-letters // 2), request.sampling.max_tokens


def used_tokens(request: Request, response: Response) -> tuple[int, int, bool]:
    """Return the tokens of a call, in and out, and whether a count is ours.

    The server's counts are used where they are possible, else the text's bytes are counted. A wrong
    count could void a cap, or stop this start and all later ones.
    """
    if request.stage == "moderation":
        return 0, 0, False
    prompt = max(
        len(request.prompt.encode("utf-8", "replace")),
        sum(len(text.encode("utf-8", "replace")) for _, text in request.messages),
    )
    given = response.prompt_tokens, response.completion_tokens
    counts, ours = [], False
    for count, written in zip(given, (prompt, response.written_bytes), strict=True):
        most = written + MAX_HIDDEN_TOKENS + request.sampling.max_tokens
        possible = written / MAX_BYTES_PER_TOKEN <= count <= most
        ours |= not possible
        counts.append(count if possible else -(-written // BYTES_PER_TOKEN))
    return counts[0], counts[1], ours


@dataclasses.dataclass
class Call:
    """A call in flight. Its tokens are set when it ends: an upper bound if `estimated`."""

    number: int = 0  # in the order of sending
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
