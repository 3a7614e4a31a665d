"""Read SODA and ProsocialDialog as their publishers ship them.

Records are JSON lines, JSON lists (ProsocialDialog's direct download) or Parquet. A record that
misses a field, or has another type in it, is an error that names file, line and field. Fields
that no example is made from may be absent; where present, they must have their type.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import DataError, shown
from cosmo.tasks.dialogues import (
    Place,
    ProsocialDialogue,
    ProsocialTurn,
    SodaDialogue,
    ToxiChatThread,
    ToxiChatTurn,
)
from cosmo.tasks.files import files_for_split, split_names
from cosmo.tasks.recognize import PROSOCIAL, naming_other_corpus
from cosmo.tasks.record_files import read_records, refuse_empty
from cosmo.tasks.safety import LABELS

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Parquet columns that are read. The others (model answers, reasons of votes) stay on disk, because
# they are most of the bytes.
_SODA_COLUMNS = ("narrative", "dialogue", "speakers")
_PROSOCIAL_COLUMNS = (
    *("context", "response", "rots", "safety_label", "safety_annotations"),
    *("dialogue_id", "response_id", "episode_done"),
)
# Absent in extracts of the corpus that leave out what a dialogue model does not read.
_SODA_OPTIONAL = {
    **dict.fromkeys(
        ("head", "relation", "tail", "literal", "PersonX", "PersonY", "PersonZ", "split"), str
    ),
    "original_index": int,
}
# Published in both forms, but no example is made from them.
_PROSOCIAL_OPTIONAL = {
    "safety_annotation_reasons": list,
    "source": str,
    "etc": str,
    "episode_done": bool,
}
TOXICHAT_BOTS = ("dgpt", "gpt3")
TOXICHAT_STANCES = ("agree", "disagree", "neutral")
_TYPE_NAMES = {str: "a string", int: "an integer", list: "a list", bool: "true or false"}


class Position(NamedTuple):
    """The place of a ProsocialDialog row in its dialogue."""

    dialogue_id: Any
    response_id: int  # counts the dialogue's responses from 0
    episode_done: bool  # False also where the row does not have the field


def read_soda(path: Any, split: str = "train") -> Iterator[SodaDialogue]:
    """Yield the SODA dialogues of `split` under `path`, in file order.

    Ids are `soda-SPLIT-N`. N counts dialogues from 0 over the split's files, in the order of
    their names. Raises DataError for a missing path and for the first bad record.
    """
    files = files_for_split(path, split)
    count = 0  # over all files, so that a corpus cut into shards keeps its ids
    for file in files:
        with naming_other_corpus(file, "SODA"):
            for place, row in read_records(file, _SODA_COLUMNS):
                yield soda_dialogue(row, place, f"soda-{split}-{count}")
                count += 1
    refuse_empty(path, split, count)


def read_toxichat(path: Any, split: str = "test") -> Iterator[ToxiChatTurn]:
    """Yield every labelled utterance of ToxiChat's `split` under `path`, in file order.

    A row has a Reddit thread and one response of each of two chatbots, which answer the thread.
    Ids are `toxichat-SPLIT-ROW-TURN`, with the chatbot's name for TURN. Raises DataError for a
    missing path and for the first bad record.
    """
    for thread in read_toxichat_threads(path, split):
        yield from thread.utterances
        # A few answers of GPT-3 are empty, and labelled safe: there is nothing to judge.
        yield from (one for one in thread.responses.values() if one.turns[-1])


def read_toxichat_threads(path: Any, split: str = "test") -> Iterator[ToxiChatThread]:
    """Yield every thread of ToxiChat's `split` with the responses to it, empty ones too.

    Ids are `toxichat-SPLIT-ROW`. Raises DataError for a missing path and for the first bad record.
    """
    count = 0
    try:
        found = files_for_split(path, split)
    except DataError as error:
        wanted = "dev" if split in split_names("validation") else split
        raise DataError(
            f"{error.message} ToxiChat's own file of this split is data/ToxiChat/{wanted}.jsonl in "
            "the repository abaheti95/ToxiChat: give its folder data/ToxiChat, with train.jsonl, "
            "dev.jsonl and test.jsonl.",
            setting=error.settings,
        ) from None
    for file in found:
        with naming_other_corpus(file, "ToxiChat"):
            for place, row in read_records(file):
                yield _toxichat_thread(row, place, f"toxichat-{split}-{count}")
                count += 1
    refuse_empty(path, split, count)


def _toxichat_thread(row: Any, place: Place, name: str) -> ToxiChatThread:
    row = _mapping(row, place)
    found: list[ToxiChatTurn] = []
    turns: tuple[str, ...] = ()
    for number, one in enumerate(_field(row, "reddit_thread", list, place), start=1):
        where = Place(place.file, place.line, f"turn {number}")
        text, offensive, stance = _toxichat_labels(one, len(turns), where)
        turns += (text,)
        found.append(ToxiChatTurn(f"{name}-{number}", turns, offensive, "human", stance))
    if not found:
        raise place.error("field 'reddit_thread' is empty", "no turn", "at least one")
    responses = {}
    for bot in TOXICHAT_BOTS:
        # Each answers the thread; neither has seen the other's answer.
        field = f"final_{bot}_response"
        if row.get(field) is not None:
            where = Place(place.file, place.line, field)
            text, offensive, stance = _toxichat_labels(row[field], len(turns), where, empty=True)
            responses[bot] = ToxiChatTurn(f"{name}-{bot}", (*turns, text), offensive, bot, stance)
    return ToxiChatThread(name, tuple(found), responses)


def _toxichat_labels(
    turn: Any, before: int, place: Place, empty: bool = False
) -> tuple[str, bool, str | None]:
    """Return (text, whether offensive, stance to the turn before); `before` counts the turns."""
    turn = _mapping(turn, place)
    label = _field(turn, "offense_label", str, place)
    if label not in ("Safe", "Offensive"):
        problem = "field 'offense_label' has an unknown value"
        raise place.error(problem, shown(label), "'Safe' or 'Offensive'")
    stance = turn.get(f"stance_label_towards_turn_{before}")
    if stance is not None and str(stance).lower() not in TOXICHAT_STANCES:
        problem = f"field 'stance_label_towards_turn_{before}' has an unknown value"
        raise place.error(problem, shown(stance), "'Agree', 'Disagree' or 'Neutral'")
    text = "" if empty and turn.get("text") == "" else _text(turn, "text", place)
    return text, label == "Offensive", stance and stance.lower()


def read_prosocial(path: Any, split: str = "train") -> Iterator[ProsocialDialogue]:
    """Yield the complete ProsocialDialog dialogues of `split` under `path`, in file order.

    A dialogue that lacks its first or a middle response is not used; a warning per file counts
    them. Ids are `prosocial-SPLIT-N`. N counts all dialogues from 0, so that an id does not depend
    on which of them are complete. Raises DataError for a missing path and for the first bad record.
    """
    files = files_for_split(path, split)
    incomplete: Counter[str] = Counter()
    count = 0
    # All files are one stream, because shards cut dialogues.
    for group in group_by_dialogue(_prosocial_rows(files), operator.itemgetter(0)):
        positions = [position for position, _ in group]
        turns = tuple(turn for _, turns in group for turn in turns)
        # A whole dialogue of the direct download has no numbers.
        if positions == [None] or [p.response_id for p in positions] == [*range(len(positions))]:
            yield ProsocialDialogue(f"prosocial-{split}-{count}", turns)
        else:
            # The file in which it begins, because shards cut dialogues.
            incomplete[turns[0].place.file] += 1
        count += 1
    for file, number in incomplete.items():
        _log.warning(
            "%s: %d incomplete dialogues are not used (their first or a middle response is "
            "missing)",
            file,
            number,
        )
    refuse_empty(path, split, count)


def group_by_dialogue(
    rows: Iterable[T], position: Callable[[T], Position | None]
) -> Iterator[list[T]]:
    """Yield the consecutive rows of each ProsocialDialog dialogue as a list.

    A dialogue ends where `dialogue_id` changes, where `response_id` does not rise, and after
    `episode_done`. A row whose `position` is None (a whole dialogue, a broken row) stands alone.
    """
    group: list[T] = []
    last: Position | None = None
    for row in rows:
        here = position(row)
        # A jump ahead is a hole in a dialogue. A jump back is another dialogue of the same number:
        # two samples of the corpus were joined.
        continues = (
            last is not None
            and here is not None
            and not last.episode_done
            and here.dialogue_id == last.dialogue_id
            and here.response_id > last.response_id
        )
        if group and not continues:
            yield group
            group = []
        group.append(row)
        last = here
    if group:
        yield group


def soda_dialogue(row: Any, place: Place, id: str) -> SodaDialogue:
    """Return `row` as a SodaDialogue; raise DataError if it is none."""
    row = _mapping(row, place)
    # It may be empty: the input then begins with the instruction.
    narrative = _field(row, "narrative", str, place)
    dialogue = _texts(row, "dialogue", place)
    speakers = _texts(row, "speakers", place)
    if not dialogue:
        raise place.error("field 'dialogue' is empty", "no utterance", "at least one")
    if len(dialogue) != len(speakers):
        raise place.error(
            "fields 'dialogue' and 'speakers' differ in length",
            f"{len(dialogue)} utterances and {len(speakers)} speakers",
            "one speaker for each utterance",
        )
    _check_optional(row, _SODA_OPTIONAL, place)
    return SodaDialogue(id, _encodable(narrative, "narrative", place).strip(), dialogue, speakers)


def prosocial_turn(row: Any, place: Place) -> ProsocialTurn:
    """Return a row of the Hugging Face hub as a ProsocialTurn; raise DataError if it is none."""
    row = _mapping(row, place)
    label = _field(row, "safety_label", str, place)
    if label not in LABELS:
        raise place.error(
            "field 'safety_label' has an unknown value", shown(label), f"one of {LABELS}"
        )
    rots = ()
    # A casual exchange has no rules of thumb: published as null or as an empty list.
    if "rots" not in row or row["rots"] is not None:
        rots = _texts(row, "rots", place, empty_texts=True)
    votes = None
    if row.get("safety_annotations") is not None:
        votes = _texts(row, "safety_annotations", place, empty_texts=True)
    _check_optional(row, _PROSOCIAL_OPTIONAL, place)
    return ProsocialTurn(
        context=_text(row, "context", place),
        response=_text(row, "response", place),
        # An empty rule of thumb is none.
        rots=tuple(rot for rot in rots if rot),
        safety_label=label,
        votes=votes,
        place=place,
    )


def direct_download_turn(row: Any, place: Place) -> ProsocialTurn:
    """Return a row of the direct download as a ProsocialTurn; raise DataError if it is none.

    It has `text` and `labels` (a list of one) for the hub's `context` and `response`.
    """
    row = _mapping(row, place)
    labels = _texts(row, "labels", place)
    if len(labels) != 1:
        raise place.error("field 'labels' has a wrong length", str(len(labels)), "one response")
    text = _text(row, "text", place)
    # As a row of the hub, so that one check serves both forms.
    return prosocial_turn({**row, "context": text, "response": labels[0]}, place)


def row_position(row: Any, place: Place) -> Position:
    """Return the place of a hub row in its dialogue; raise DataError if it has none."""
    row = _mapping(row, place)
    dialogue_id = _field(row, "dialogue_id", int, place)
    response_id = _field(row, "response_id", int, place)
    # A copy without this field is cut where the response's number does not rise.
    return Position(dialogue_id, response_id, bool(row.get("episode_done")))


def _prosocial_rows(
    files: Sequence[Any],
) -> Iterator[tuple[Position | None, list[ProsocialTurn]]]:
    """Yield each hub row with its position, and each whole dialogue with None."""
    for file in files:
        with naming_other_corpus(file, *PROSOCIAL):
            for place, row in read_records(file, _PROSOCIAL_COLUMNS):
                if isinstance(row, list):
                    yield None, _direct_download_turns(row, place)
                else:
                    yield row_position(row, place), [prosocial_turn(row, place)]


def _direct_download_turns(rows: list[Any], place: Place) -> list[ProsocialTurn]:
    if not rows:
        raise place.error("a dialogue is empty", "no rows", "at least one")
    return [
        # A line holds the whole dialogue, so the row's number is needed too.
        direct_download_turn(row, Place(place.file, place.line, f"{place.inside}, row {number}"))
        for number, row in enumerate(rows, start=1)
    ]


def _mapping(row: Any, place: Place) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise place.error("not a record", shown(row), "an object with named fields")
    return row


def _field(row: Mapping[str, Any], name: str, kind: type, place: Place) -> Any:
    if name not in row:
        raise place.error(
            f"field '{name}' is missing", f"the fields {sorted(row)}", _TYPE_NAMES[kind]
        )
    value = row[name]
    # bool is a subclass of int, but true is no dialogue number.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise place.error(
            f"field '{name}' has a wrong type",
            f"{type(value).__name__} {shown(value)}",
            _TYPE_NAMES[kind],
        )
    return value


def _encodable(text: str, name: str, place: Place) -> str:
    # JSON can spell half a surrogate pair, which no vocabulary can read.
    if not json_lines.is_whole(text):
        raise place.error(
            f"field '{name}' is not valid text", shown(text), "characters UTF-8 can encode"
        )
    return text


def _text(row: Mapping[str, Any], name: str, place: Place) -> str:
    text = _encodable(_field(row, name, str, place), name, place).strip()
    if not text:
        raise place.error(f"field '{name}' is empty", shown(row[name]), "a text")
    return text


def _texts(
    row: Mapping[str, Any], name: str, place: Place, empty_texts: bool = False
) -> tuple[str, ...]:
    texts = []
    for index, text in enumerate(_field(row, name, list, place)):
        entry = f"{name}[{index}]"
        if not isinstance(text, str):
            raise place.error(
                f"field '{entry}' has a wrong type",
                f"{type(text).__name__} {shown(text)}",
                _TYPE_NAMES[str],
            )
        stripped = _encodable(text, entry, place).strip()
        if not stripped and not empty_texts:
            raise place.error(f"field '{entry}' is empty", shown(text), "a text")
        texts.append(stripped)
    return tuple(texts)


# Their types are checked although no example is made from them, because a wrong one is a sign of a
# damaged or converted file.
def _check_optional(row: Mapping[str, Any], kinds: Mapping[str, type], place: Place) -> None:
    for name, kind in kinds.items():
        if row.get(name) is not None:
            _field(row, name, kind, place)
