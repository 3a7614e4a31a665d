"""The dialogues of SODA and ProsocialDialog as frozen dataclasses, and where a record stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosmo.engine.base.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where a record came from: a file, a line from 1 (a row for Parquet), and more, in words."""

    file: str
    line: int
    inside: str = ""

    def error(self, problem: str, got: str, expected: str) -> DataError:
        """The DataError for this place."""
        problem = f"{self.inside}: {problem}" if self.inside else problem
        remedy = "Correct or remove the record."
        return DataError.at(
            self.file, self.line, problem, got=got, expected=expected, remedy=remedy
        )


@dataclass(frozen=True)
class SodaDialogue:
    """One SODA dialogue: `speakers[i]` says `dialogue[i]`. Kim et al. 2023."""

    id: str
    narrative: str
    dialogue: tuple[str, ...]
    speakers: tuple[str, ...]


@dataclass(frozen=True)
class ProsocialTurn:
    """One exchange: the other speaker's `context`, the guiding speaker's `response`.

    `rots` are the rules of thumb the response was written from, possibly none; `safety_label`
    (one of SAFETY_LABELS) judges the context, `votes` are the annotators' judgements that it was
    made from (None where the row has none), unchecked, `place` is where the row stands.
    """

    context: str
    response: str
    rots: tuple[str, ...]
    safety_label: str
    votes: tuple[str, ...] | None = None
    place: Place | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ProsocialDialogue:
    """One complete ProsocialDialog dialogue, its exchanges in order. Kim et al. 2022."""

    id: str
    turns: tuple[ProsocialTurn, ...]
