"""SODA and ProsocialDialog as their publishers ship them, read into records.

JSON lines, JSON lists (ProsocialDialog's direct download) and Parquet; plain or gzipped; one
file, a folder or a glob; local or remote. See `tasks.files` for how paths and splits are found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cosmo.tasks.dialogues import Place, ProsocialDialogue, ProsocialTurn, SodaDialogue
from cosmo.tasks.files import files_for_split, resolve, splits_of
from cosmo.tasks.raw import refuse_empty, rows
from cosmo.tasks.recognize import PROSOCIAL, named
from cosmo.tasks.records import direct_download_turn, prosocial_turn, row_position, soda_dialogue

__all__ = [
    "ProsocialDialogue",
    "ProsocialTurn",
    "SodaDialogue",
    "files_for_split",
    "read_prosocial",
    "read_soda",
    "resolve",
    "splits_of",
]

_log = logging.getLogger(__name__)

# Parquet columns that are read; the rest (model answers, reasons of votes) stay on disk.
_SODA_COLUMNS = ("narrative", "dialogue", "speakers")
_PROSOCIAL_COLUMNS = (
    "context",
    "response",
    "rots",
    "safety_label",
    "safety_annotations",
    "dialogue_id",
    "response_id",
    "episode_done",
)


def read_soda(path: Any, split: str = "train") -> Iterator[SodaDialogue]:
    """The SODA dialogues of `split` under `path`, in file order.

    Ids are `soda-SPLIT-N`, N counting dialogues from 0 over the split's files in the order of
    their names. Raises DataError for a missing path and for the first bad record.
    """
    files = files_for_split(path, split)
    count = 0
    for file in files:
        with named(file, "SODA"):
            for place, row in rows(file, _SODA_COLUMNS):
                yield soda_dialogue(row, place, f"soda-{split}-{count}")
                count += 1
    refuse_empty(files, count)


def read_prosocial(path: Any, split: str = "train") -> Iterator[ProsocialDialogue]:
    """The complete ProsocialDialog dialogues of `split` under `path`, in file order.

    Hub rows are joined to dialogues: a new one starts when `dialogue_id` changes or
    `response_id` does not go on. A dialogue that lacks its first or a middle response is not
    used; a warning per file counts them. Ids are `prosocial-SPLIT-N`, N counting all dialogues
    from 0. Raises DataError for a missing path and for the first bad record.
    """
    files = files_for_split(path, split)
    joiner = _Joiner(f"prosocial-{split}")
    for file in files:
        with named(file, *PROSOCIAL):
            for place, row in rows(file, _PROSOCIAL_COLUMNS):
                if isinstance(row, list):
                    yield from joiner.finish()
                    yield from joiner.whole(_nested_turns(row, place))
                else:
                    yield from joiner.add(row, place)
        # Shards cut dialogues: only the next file can tell whether this one's last goes on.
        joiner.report()
    yield from joiner.finish()
    joiner.report()
    refuse_empty(files, joiner.count)


@dataclass
class _Joiner:
    """Joins consecutive hub rows to dialogues and counts those that cannot be used."""

    prefix: str
    count: int = 0  # dialogues begun, complete or not
    turns: list[ProsocialTurn] = field(default_factory=list)
    dialogue_id: int | None = None
    next_response: int = 0
    complete: bool = True
    ended: bool = True
    file: str = ""
    incomplete: dict[str, int] = field(default_factory=dict)

    def add(self, row: Any, place: Place) -> Iterator[ProsocialDialogue]:
        """Takes one row; yields the dialogue before it when the row starts another."""
        dialogue_id, response_id, done = row_position(row, place)
        # A jump ahead inside a dialogue is a hole in it; a jump back is another dialogue that
        # has the same number, as happens where two samples of the corpus were joined.
        if self.ended or dialogue_id != self.dialogue_id or response_id < self.next_response:
            yield from self.finish()
            self.dialogue_id, self.next_response, self.complete = dialogue_id, 0, True
            self.file = place.file
        self.complete &= response_id == self.next_response
        self.turns.append(prosocial_turn(row, place))
        self.next_response, self.ended = response_id + 1, done

    def whole(self, turns: Sequence[ProsocialTurn]) -> Iterator[ProsocialDialogue]:
        """Takes a dialogue that came in one piece."""
        yield ProsocialDialogue(f"{self.prefix}-{self.count}", tuple(turns))
        self.count += 1

    def finish(self) -> Iterator[ProsocialDialogue]:
        """Yields the dialogue under way, if there is one and it is complete."""
        if self.turns and self.complete:
            yield ProsocialDialogue(f"{self.prefix}-{self.count}", tuple(self.turns))
        elif self.turns:
            self.incomplete[self.file] = self.incomplete.get(self.file, 0) + 1
        self.count += bool(self.turns)
        self.turns, self.ended = [], True

    def report(self) -> None:
        """Warns of the incomplete dialogues counted since the last report."""
        for file, number in self.incomplete.items():
            _log.warning(
                "%s: %d incomplete dialogues are not used (their first or a middle response is "
                "missing)",
                file,
                number,
            )
        self.incomplete = {}


def _nested_turns(rows: list[Any], place: Place) -> list[ProsocialTurn]:
    if not rows:
        raise place.error("a dialogue is empty", "no rows", "at least one")
    return [
        direct_download_turn(row, Place(place.file, place.line, f"{place.inside}, row {number}"))
        for number, row in enumerate(rows, start=1)
    ]
