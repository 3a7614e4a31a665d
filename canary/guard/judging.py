"""Ask Canary for the label of a dialogue, in time; take the most severe one of several."""

import asyncio
import dataclasses
import logging
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from canary.guard import dialogue
from canary.guard.policy import Policy
from cosmo.tasks import safety

log = logging.getLogger("canary.guard")

HUMAN = "__needs_intervention__"
ANSWER_PIECES = 64  # of one sentence with what stands before it, or of one call of a tool


class Chirp(Protocol):
    """An answer of a labeller; see `canary.module.Chirp`."""

    label: str
    probabilities: dict[str, float]
    rots: tuple[str, ...]


class Labels(Protocol):
    """The labeller that the guard asks; see `canary.labeller.Labeller`."""

    async def label(self, turns: Sequence[str], *, rots: bool) -> Chirp:
        """Return the label of the last turn."""
        ...


class CanaryFailedError(Exception):
    """Canary gave no label: it failed, was late, or is overloaded. The text names the cause."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A label, or with `problem` none, because Canary failed and the policy is open."""

    label: str | None
    probabilities: Mapping[str, float]
    rots: tuple[str, ...]
    seconds: float
    problem: str | None = None


class Judge:
    """Canary, asked by a policy.

    `measure` counts the tokens of a text, of which `budget` fit in a turn. `unread` returns the
    share of a text's letters that Canary cannot read.
    """

    def __init__(
        self,
        labels: Labels,
        policy: Policy,
        measure: Callable[[str], int],
        budget: int,
        unread: Callable[[str], float] = lambda text: 0.0,
    ):
        self.labels, self.policy, self.measure, self.budget = labels, policy, measure, budget
        self.unread = unread

    async def turn(self, dialogues: Sequence[Sequence[str]]) -> Verdict:
        """Return the most severe label of the dialogues, with its RoTs.

        Raises RefusedError for a turn that is too long or cannot be read, CanaryFailedError if
        the policy is closed.
        """
        seen = [
            window
            for turns in dialogues
            for window in self._windows(turns, self.policy.dialogue.max_pieces)
        ]
        for window in seen:
            self._check_letters(window[-1])
        return await self._most_severe(seen, True, self.policy.turn_label)

    def recent(self, turns: Sequence[str]) -> tuple[str, ...]:
        """Return what Canary can read of `turns`, for `sentence`. Raises RefusedError."""
        most = self.policy.dialogue.max_turns
        return dialogue.recent(turns, self.measure, self.budget, most)

    async def sentence(self, turns: Sequence[str], before: str, text: str) -> Verdict:
        """Return the label of a sentence, which follows `before` in an answer to `turns`.

        Raises as `turn`.
        """
        self._check_letters(text)
        seen = self._windows((*turns, before + text), ANSWER_PIECES)
        return await self._most_severe(seen, False, self.policy.answer_label)

    def _check_letters(self, text: str) -> None:
        rules = self.policy.dialogue
        if rules.unreadable == "refuse" and self.unread(text) > rules.max_unread_share:
            raise dialogue.RefusedError(
                "most letters of a text are not in Canary's vocabulary, and the guard's policy "
                "refuses what it cannot read",
                "messages",
                "unreadable",
            )

    def _windows(self, turns: Sequence[str], max_pieces: int) -> list[tuple[str, ...]]:
        most = self.policy.dialogue.max_turns
        return dialogue.windows(
            turns, self.measure, self.budget, max_turns=most, max_pieces=max_pieces
        )

    async def _most_severe(
        self,
        seen: Sequence[Sequence[str]],
        rots: bool,
        held: Callable[[Mapping[str, float], str], str],
    ) -> Verdict:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.policy.limits.label_seconds):
                chirps = await _all([self.labels.label(turns, rots=rots) for turns in seen])
        except Exception as error:
            # The cause in words, not its text: that may repeat what people wrote.
            problem = "late" if isinstance(error, TimeoutError) else type(error).__name__
            log.warning("Canary gave no label: %s", problem)
            if self.policy.failure.canary == "closed":
                raise CanaryFailedError(problem) from error
            return Verdict(None, {}, (), time.monotonic() - began, problem)
        found = [(held(chirp.probabilities, chirp.label), chirp) for chirp in chirps]
        label, chirp = max(found, key=lambda one: safety.LABELS.index(one[0]))
        rules = dialogue.clean_rots(chirp.rots) if rots else ()
        return Verdict(label, dict(chirp.probabilities), rules, time.monotonic() - began)


async def _all(asked: Sequence[Any]) -> list[Chirp]:
    """Await all; where one fails, cancel the others."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _letter(one: str) -> bool:
    """Return whether a character is a letter, be it a symbol such as one in a square.

    Tags are letters that no screen shows and that models read. Flags are none.
    """
    name = "" if one.isascii() or one.isalpha() else unicodedata.name(one, "")
    return one.isalpha() or (" LETTER " in name and not name.startswith("REGIONAL"))


def of_model(canary: Any) -> tuple[Callable[[str], int], int, Callable[[str], float]]:
    """Return (measure, budget, unread) for a `Judge` that asks a loaded Canary."""
    vocabulary = canary.session.vocabulary

    def unread(text: str) -> float:
        # Spelt as SentencePiece spells it before it looks for pieces.
        letters = [one for one in unicodedata.normalize("NFKC", text).casefold() if _letter(one)]
        known = set(vocabulary.decode(vocabulary.encode("".join(letters))).casefold())
        return sum(one not in known for one in letters) / max(1, len(letters))

    return (
        lambda text: len(vocabulary.encode(text)),
        canary.session.lengths["inputs"] - 1,
        unread,
    )
