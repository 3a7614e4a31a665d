"""Read the dialogues of corpus files for counting: a bad record is yielded, never raised.

Training refuses a corpus with a bad record; statistics report the fault and continue.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks import conversations
from cosmo.tasks.dialogues import Place, ProsocialTurn, utterances
from cosmo.tasks.readers import (
    Position,
    direct_download_turn,
    group_by_dialogue,
    prosocial_turn,
    row_position,
    soda_dialogue,
)
from cosmo.tasks.record_files import (
    is_columnar,
    read_entries,
    read_lines,
    read_records,
    read_table,
)

T = TypeVar("T")
Item = tuple[Place, Any]  # a record, or a line of a text file, and where it stands

# Parquet columns that are counted.
COLUMNS = (
    *("narrative", "dialogue", "speakers"),
    *("context", "response", "rots", "safety_label", "safety_annotations", "source"),
    *("dialogue_id", "response_id", "episode_done", "turns"),
    *("chat_id", "query"),
)


@dataclass(frozen=True)
class Labelled:
    """A row of ProsocialDialog; `turn` counts the contexts of its dialogue from 1."""

    turn: int
    exchange: ProsocialTurn
    source: str | None


@dataclass(frozen=True)
class Read:
    """A dialogue or a part of one: `lacks` names the missing part, empty if none is missing."""

    utterances: tuple[str, ...]
    rows: tuple[Labelled, ...] = ()
    lacks: str = ""


def read(files: Sequence[Any], corpus: str) -> Iterator[Read | DataError]:
    """Yield the dialogues of `files`, all of `corpus` (a key of READERS), in order.

    A DataError in their place is a record that cannot be used.
    """
    items, reader = READERS[corpus]
    # One stream, so that a dialogue cut between two files is whole.
    yield from reader(item for file in files for item in items(file))


def _whole_file(read: Callable[[Any], Iterator[Item | DataError]]) -> Callable:
    """Return `read`, a reader of one file, with a fault that ends the file yielded, not raised."""

    def items(file: Any) -> Iterator[Item | DataError]:
        try:
            yield from read(file)
        except DataError as error:
            yield DataError(f"{error} The rest of the file is not counted.")

    return items


@_whole_file
def records(file: Any) -> Iterator[Item | DataError]:
    """Yield records of JSON lines, a JSON list or Parquet; a fault ends the latter two."""
    if is_columnar(file) or _is_list(file):
        yield from read_records(file, COLUMNS)
        return
    for number, line in read_lines(file):
        if not line.strip():
            continue
        place = Place(str(file), number)
        try:
            item = place, json_lines.value(line)
        except ValueError as error:
            # A broken line costs itself alone: the next line is a record of its own.
            item = place.error(f"broken JSON ({error})", shown(line.strip()), "one JSON object")
        yield item


@_whole_file
def lines(file: Any) -> Iterator[Item | DataError]:
    """Yield the lines of a text file that are not empty."""
    for number, line in read_lines(file):
        if line.strip():
            yield Place(str(file), number), line.rstrip("\r\n")


def _is_list(file: Any) -> bool:
    # By the first character: a JSON list may be of any size.
    first = next((line for _, line in read_lines(file) if line.strip()), "")
    return first.lstrip().startswith("[")


def _each(items: Iterable[Item | DataError], parse: Any) -> Iterator[Read | DataError]:
    """Yield a dialogue of every item; `parse(value, place)` returns its utterances."""
    for item in items:
        if isinstance(item, DataError):
            yield item
            continue
        place, value = item
        try:
            yield Read(utterances(parse(value, place), place))
        except DataError as error:
            yield error
        # Published files hold a few records of other shapes: each is one bad record, not the end.
        except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            problem = f"not as its corpus is published ({type(error).__name__} {error})"
            yield place.error(problem, shown(value), "the fields of the format")


def _prosocial(items: Iterable[Item | DataError]) -> Iterator[Read | DataError]:
    """Join rows to dialogues; a row that is bad or missing leaves its dialogue incomplete."""
    errors: list[DataError] = []

    def parse(value: Any, place: Place) -> tuple[Position | None, Any, bool]:
        if isinstance(value, list):
            return None, list(_nested(value, place)), True
        here = row_position(value, place)
        row = Labelled(here.response_id + 1, prosocial_turn(value, place), value.get("source"))
        # Without the field nothing is known of the end, so it does not count as lacking.
        return here, row, here.episode_done or "episode_done" not in value

    for group in group_by_dialogue(_parsed(items, parse, errors), operator.itemgetter(0)):
        # A nested dialogue of the direct download has no position: it is complete in itself.
        position, row, ended = group[-1]
        if position is None:
            yield from row
        else:
            yield _dialogue([row for _, row, _ in group], ended)
        yield from errors
        errors.clear()
    yield from errors


def _parsed(
    items: Iterable[Item | DataError], parse: Callable[[Any, Place], T], errors: list[DataError]
) -> Iterator[T]:
    """Yield `parse(value, place)` of each item. Those that cannot be used go to `errors`."""
    for item in items:
        if isinstance(item, DataError):
            errors.append(item)
            continue
        place, value = item
        try:
            yield parse(value, place)
        except DataError as error:
            errors.append(error)


def _nested(values: list[Any], place: Place) -> Iterator[Read | DataError]:
    """Yield a dialogue of the direct download: a list of rows."""
    rows = []
    for turn, value in enumerate(values, 1):
        try:
            at = Place(place.file, place.line, f"{place.inside}, row {turn}")
            # A bad row leaves a gap, which `_dialogue` names.
            rows.append(Labelled(turn, direct_download_turn(value, at), value.get("source")))
        except DataError as error:
            yield error
    if rows:
        # The list is the whole dialogue, so its last row is the end.
        yield _dialogue(rows, rows[-1].turn == len(values))
    elif not values:
        yield place.error("a dialogue is empty", "no rows", "at least one")


def _dialogue(rows: Sequence[Labelled], ended: bool) -> Read:
    # The earliest missing part is named, so a later check replaces an earlier one's.
    lacks = "" if ended else "end"
    if rows[-1].turn - rows[0].turn + 1 != len(rows):
        lacks = "middle"
    if rows[0].turn != 1:
        lacks = "beginning"
    said = [(row.exchange.context, row.exchange.response) for row in rows]
    return Read(tuple(text for pair in said for text in pair), tuple(rows), lacks)


def _empathetic(items: Iterable[Item | DataError]) -> Iterator[Read | DataError]:
    """Join rows by conv_id to dialogues; one out of order leaves its dialogue incomplete."""
    errors: list[DataError] = []
    parsed = _parsed(items, conversations.empathetic_utterance, errors)
    for _, group in itertools.groupby(parsed, operator.itemgetter(0)):
        _, numbers, turns = zip(*group, strict=True)
        yield Read(turns, lacks=_lacking(numbers))
        yield from errors
        errors.clear()
    yield from errors


def _holle(items: Iterable[Item | DataError]) -> Iterator[Read | DataError]:
    """Join the records of a chat_id to dialogues."""
    errors: list[DataError] = []
    parsed = _parsed(items, conversations.holle_record, errors)
    for _, group in itertools.groupby(parsed, operator.itemgetter(0)):
        yield Read(conversations.holle_turns(list(group)))
        yield from errors
        errors.clear()
    yield from errors


def _mic(items: Iterable[Item | DataError]) -> Iterator[Read | DataError]:
    """Yield each question with its answer once: a row of MIC is one of its rules of thumb."""
    seen: set[int] = set()
    for item in items:
        if isinstance(item, DataError):
            yield item
            continue
        place, row = item
        key = hash((row["Q"], row["A"]))
        if key not in seen:
            seen.add(key)
            try:
                yield Read(utterances([row["Q"], row["A"]], place))
            except DataError as error:
                yield error


@_whole_file
def _mic_rows(file: Any) -> Iterator[Item | DataError]:
    yield from read_table(file, ",", ("Q", "A"))


def _persona_chat(items: Iterable[Item | DataError]) -> Iterator[Read | DataError]:
    """Join numbered lines to dialogues; a bad or missing line leaves its dialogue incomplete."""
    errors: list[DataError] = []

    for group in conversations.group_persona_lines(
        _parsed(items, conversations.persona_line, errors)
    ):
        try:
            turns = conversations.persona_conversation(group).turns
            yield Read(turns, lacks=_lacking([line.number for line in group]))
        except DataError as error:
            yield error
        yield from errors
        errors.clear()
    yield from errors


def _lacking(numbers: Sequence[int]) -> str:
    """Return the missing part of a dialogue whose utterances are numbered from 1."""
    if conversations.numbered_from_1(numbers):
        return ""
    return "beginning" if numbers[0] != 1 else "middle"


def _turns(parse: Callable[[Any, Place], Sequence[Any]]) -> Any:
    """Return a reader of items that are a dialogue each: `parse` returns its utterances."""
    return functools.partial(_each, parse=parse)


def _conversation(parse: Callable[[Any, Place], conversations.Conversation]) -> Any:
    """Return a reader of items that `parse` makes a conversation of."""
    return _turns(lambda value, place: parse(value, place).turns)


# Corpora by the names of tasks.recognize: how files are cut into items, and how items are read.
READERS = {
    "SODA": (records, _turns(lambda row, place: soda_dialogue(row, place, "").dialogue)),
    "ProsocialDialog": (records, _prosocial),
    "ProsocialDialog (direct download)": (records, _prosocial),
    "DailyDialog": (lines, _turns(conversations.dailydialog_turns)),
    "EmpatheticDialogues": (_whole_file(conversations.empathetic_rows), _empathetic),
    "BlendedSkillTalk": (records, _conversation(conversations.blended_conversation)),
    # One JSON object holds all conversations, by their ids.
    "Topical-Chat": (_whole_file(read_entries), _conversation(conversations.topical_conversation)),
    "PersonaChat": (lines, _persona_chat),
    "Wizard of Wikipedia": (records, _conversation(conversations.wizard_conversation)),
    "Holl-E": (records, _holle),
    "MIC": (_mic_rows, _mic),
    'records {"turns": [...]}': (records, _turns(lambda row, place: row["turns"])),
}
