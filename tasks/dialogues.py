"""The dialogues of SODA and ProsocialDialog as frozen dataclasses, and the place of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import DataError, shown


@dataclass(frozen=True)
class Place:
    """The place of a record: a file, a line from 1 (a row for Parquet), and more in words."""

    file: str
    line: int
    inside: str = ""

    def error(self, problem: str, got: str, expected: str) -> DataError:
        """Return the DataError for this place."""
        problem = f"{self.inside}: {problem}" if self.inside else problem
        # One remedy for all, because only the user knows which of both is right.
        remedy = "Correct or remove the record."
        return DataError.at(
            self.file, self.line, problem, got=got, expected=expected, remedy=remedy
        )


@dataclass(frozen=True)
class SodaDialogue:
    """One SODA dialogue: `speakers[i]` utters `dialogue[i]`. Kim et al. 2023."""

    id: str
    narrative: str
    dialogue: tuple[str, ...]
    speakers: tuple[str, ...]


@dataclass(frozen=True)
class ProsocialTurn:
    """One exchange: the other speaker's `context`, the guiding speaker's `response`.

    `rots` are the rules of thumb that the response was written from, possibly none. `safety_label`
    (one of `safety.LABELS`) judges the context. `votes` are the annotators' judgements that it was
    made from, unchecked (None if the row has none).
    """

    context: str
    response: str
    rots: tuple[str, ...]
    safety_label: str
    # Checked where labels are used, because Cosmo reads the same rows without them.
    votes: tuple[str, ...] | None = None
    # Not compared, because the same row in another file is the same exchange.
    place: Place | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ProsocialDialogue:
    """One complete ProsocialDialog dialogue, its exchanges in order. Kim et al. 2022."""

    id: str
    turns: tuple[ProsocialTurn, ...]


def utterances(values: Any, place: Place) -> tuple[str, ...]:
    """Return utterances, stripped; raise DataError if there is none, or one is empty or no text."""
    # A string in place of the list would pass letter by letter.
    if not isinstance(values, list | tuple):
        raise place.error("the utterances are no list", shown(values), "a list of texts")
    if not values:
        raise place.error("a dialogue is empty", "no utterance", "at least one")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value.strip():
            raise place.error(f"utterance {number} is empty or no text", shown(value), "a text")
        if not json_lines.is_whole(value):
            raise place.error(
                f"utterance {number} is not valid text", shown(value), "characters UTF-8 can encode"
            )
    return tuple(value.strip() for value in values)


@dataclass(frozen=True)
class ToxiChatTurn:
    """One utterance of ToxiChat, the last of `turns`, and whether annotators found it offensive.

    Baheti et al. 2021. `author` is "human" or the chatbot that wrote it, "dgpt" or "gpt3".
    `stance` is its stance to the turn before it ("agree", "disagree", "neutral"), if labelled.
    """

    id: str
    turns: tuple[str, ...]
    offensive: bool
    author: str
    stance: str | None = None


@dataclass(frozen=True)
class ToxiChatThread:
    """A Reddit thread of ToxiChat, and the chatbots' responses to it by name, maybe empty ones."""

    id: str
    utterances: tuple[ToxiChatTurn, ...]
    responses: Mapping[str, ToxiChatTurn]

    @property
    def turns(self) -> tuple[str, ...]:
        """Return the thread's texts."""
        return self.utterances[-1].turns
