"""Raw rows of SODA and ProsocialDialog, checked and made into `dialogues`.

A record that misses a field or has another type in it is an error that names file, line and
field. Fields that no example is made from may be absent; present, they must have their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmo.tasks import safety
from cosmo.tasks.dialogues import Place, ProsocialTurn, SodaDialogue
from cosmo.tasks.errors import shown

SAFETY_LABELS = safety.LABELS

_SODA_OPTIONAL = {
    "head": str,
    "relation": str,
    "tail": str,
    "literal": str,
    "PersonX": str,
    "PersonY": str,
    "PersonZ": str,
    "original_index": int,
    "split": str,
}
_PROSOCIAL_OPTIONAL = {
    "safety_annotation_reasons": list,
    "source": str,
    "etc": str,
    "episode_done": bool,
}
_TYPE_NAMES = {str: "a string", int: "an integer", list: "a list", bool: "true or false"}


def soda_dialogue(row: Any, place: Place, id: str) -> SodaDialogue:
    """`row` as a SodaDialogue. Raises DataError where it is not one."""
    row = _mapping(row, place)
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
    """A ProsocialDialog hub row (without its place in the dialogue) as a ProsocialTurn."""
    row = _mapping(row, place)
    label = _field(row, "safety_label", str, place)
    if label not in SAFETY_LABELS:
        raise place.error(
            "field 'safety_label' has an unknown value", shown(label), f"one of {SAFETY_LABELS}"
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
        rots=tuple(rot for rot in rots if rot),
        safety_label=label,
        votes=votes,
        place=place,
    )


def direct_download_turn(row: Any, place: Place) -> ProsocialTurn:
    """A row of ProsocialDialog's direct download: `text` and `labels` for context and response."""
    row = _mapping(row, place)
    labels = _texts(row, "labels", place)
    if len(labels) != 1:
        raise place.error("field 'labels' has a wrong length", str(len(labels)), "one response")
    text = _text(row, "text", place)
    return prosocial_turn({**row, "context": text, "response": labels[0]}, place)


def row_position(row: Any, place: Place) -> tuple[int, int, bool]:
    """(dialogue_id, response_id, episode_done) of a hub row."""
    row = _mapping(row, place)
    dialogue_id = _field(row, "dialogue_id", int, place)
    response_id = _field(row, "response_id", int, place)
    return dialogue_id, response_id, bool(row.get("episode_done"))


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
    # JSON can spell half a surrogate pair, which no later stage can write as UTF-8.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise place.error(
                f"field '{name}' is not valid text", shown(text), "characters UTF-8 can encode"
            ) from None
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


def _check_optional(row: Mapping[str, Any], kinds: Mapping[str, type], place: Place) -> None:
    for name, kind in kinds.items():
        if row.get(name) is not None:
            _field(row, name, kind, place)
