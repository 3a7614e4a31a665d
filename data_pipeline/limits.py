"""How fast and how much may be asked: calls at once, rates a minute, caps on tokens and on cost.

A rate is a bucket that fills steadily and may be overdrawn: whoever takes from it is told how long
to wait, in the order of asking. Tokens of an answer are not known beforehand: for a rate the mean
of its stage is taken, and put right when the answer has come; for a cap the most that it may have,
so that no cap is passed. A call that may have been billed, but whose answer cannot be read, is
charged that most. The clock and the sleep are parameters, so tests wait for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

from data_pipeline.requests import Request


class ClosedError(Exception):
    """No further call may begin: a cap is reached, or the run is to stop.

    The running ones are waited for and kept.
    """


@dataclasses.dataclass(frozen=True)
class Allowance:
    """What the user allows; None is no limit. Prices are for a million tokens."""

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    token_cap: int | None = None
    cost_cap: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What tokens cost, in the currency of the prices."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


class Bucket:
    """`per_minute` units flow in, steadily; a second's worth may be saved up."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.rate = per_minute / 60
        self.most = max(self.rate, 1.0)
        self.level = self.most
        self.clock, self.then = clock, clock()

    def take(self, amount: float) -> float:
        """Take `amount`, which may overdraw; the seconds to wait before using it."""
        now = self.clock()
        self.level = min(self.most, self.level + (now - self.then) * self.rate)
        self.then = now
        self.level -= amount
        return max(0.0, -self.level / self.rate)


class Limits:
    """The gate before every call.

    `spent` is (prompt tokens, completion tokens) of earlier starts, which the caps count too.
    """

    def __init__(
        self,
        allowance: Allowance,
        spent: tuple[int, int] = (0, 0),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = asyncio.sleep,
    ):
        self.allowance, self.clock, self.sleep = allowance, clock, sleep
        self.spent_in, self.spent_out = spent
        self.held: list[float] = [0.0, 0.0]  # the most that calls under way may use, in and out
        self._under_way = 0
        self._settled = asyncio.Event()
        self.running = self.most_running = 0  # calls that are with the server now
        self.closed: str | None = None
        self.paused_until = 0.0
        self._slots = asyncio.Semaphore(allowance.concurrency)
        minute = allowance.requests_per_minute
        self._requests = Bucket(minute, clock) if minute else None
        minute = allowance.tokens_per_minute
        self._tokens = Bucket(minute, clock) if minute else None
        self._means: dict[str, tuple[int, int]] = {}  # stage -> calls, completion tokens

    def close(self, reason: str) -> None:
        """No call begins from now on; the first reason is told."""
        self.closed = self.closed or reason
        self._settled.set()  # whoever waits for room is to see it

    def pause(self, seconds: float) -> None:
        """Nobody begins a call for so long: the server asked for it."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def estimate(self, request: Request) -> tuple[float, float]:
        """Prompt and completion tokens that a call will take: a guess, made before it."""
        calls, tokens = self._means.get(request.stage, (0, 0))
        expected = tokens / calls if calls else request.sampling.max_tokens / 4
        return len(request.prompt) / 4, expected if request.stage != "moderation" else 0.0

    @contextlib.asynccontextmanager
    async def slot(self, request: Request) -> AsyncIterator[Call]:
        """Wait until `request` may be sent, then hold one of the places of calls at once.

        Raises ClosedError if no further call may begin.
        """
        async with self._slots:
            most = most_tokens(request)
            await self._room(*most)
            call = Call()
            guess_in, guess_out = self.estimate(request)
            self._hold(1, *most)
            try:
                wait = self._requests.take(1) if self._requests else 0.0
                if self._tokens:
                    wait = max(wait, self._tokens.take(guess_in + guess_out))
                until = self.clock() + wait
                while (now := self.clock()) < max(until, self.paused_until):
                    await self.sleep(max(until, self.paused_until) - now)
                    self._check_open()
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
            return  # no measure of what answers take
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
        """Wait until the caps have room for a call; close if they have none with nobody under way.

        Raises ClosedError.
        """
        self._check_open()
        while (full := self._full(most_in, most_out)) is not None:
            if not self._under_way:
                self.close(full)
            self._check_open()
            self._settled.clear()
            await self._settled.wait()
        self._check_open()

    def _full(self, most_in: float, most_out: float) -> str | None:
        """The cap that a call might pass, and how far it is used."""
        allowance = self.allowance
        tokens_in = self.spent_in + self.held[0] + most_in
        tokens_out = self.spent_out + self.held[1] + most_out
        cap, spent = allowance.token_cap, self.spent_in + self.spent_out
        if cap is not None and tokens_in + tokens_out > cap:
            need = f"the next call may take {most_in + most_out:.0f}"
            return f"--token_cap={cap} is reached ({spent} tokens used, {need})"
        cap, cost = allowance.cost_cap, allowance.cost(self.spent_in, self.spent_out)
        if cap is not None and allowance.cost(tokens_in, tokens_out) > cap:
            need = f"the next call may cost {allowance.cost(most_in, most_out):.4f}"
            return f"--cost_cap={cap:g} is reached ({cost:.4f} spent, {need})"
        return None


def most_tokens(request: Request) -> tuple[int, int]:
    """The most tokens that a request may take, in and out: no token is shorter than two letters,
    but for rare scripts."""
    if request.stage == "moderation":
        return 0, 0
    letters = max(len(request.prompt), sum(len(text) for _, text in request.messages))
    return -(-letters // 2), request.sampling.max_tokens


@dataclasses.dataclass
class Call:
    """One call's tokens, filled in when its answer is there; the most of them if `estimated`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
