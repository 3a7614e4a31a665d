"""Turn plain dialogue records into rows that the engine answers, without SeqIO or TensorFlow."""

import dataclasses
import difflib
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import shown
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.data.datasets import Row
from cosmo.engine.infer import record_sources
from cosmo.tasks import formatting, prost_text
from cosmo.tasks.vocabularies import ByteLevelVocabulary

log = logging.getLogger(__name__)

FIELDS = "{narrative, instruction, turns}"
KNOWN = frozenset({"id", "narrative", "instruction", "turns", "response"})
FIELDS_NAMED = 20  # of the unknown fields
DOUBLES_NAMED = 3  # ids given twice that the warning names; the others are counted
_AUTOMATIC = re.compile(r"(#*)\d+")


def row(
    record: Mapping[str, Any],
    vocabulary: Vocabulary,
    inputs_length: int,
    separators: formatting.Separators = formatting.Separators(),
    default_id: str = "0",
) -> Row:
    """Return a record {turns, narrative?, instruction?, response?, id?} as the model reads it.

    Oldest turns are left out, whole, until the rest fits `inputs_length` tokens. A last turn that
    is too long alone loses its front. Either is a row's `cut`. BlenderBot's history is
    that of `prost_text.history_ids`, narrative and instruction as lines before the first turn.
    Other fields are ignored. Raises ValueError that names the field that is wrong.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"got {type(record).__name__}, expected an object {FIELDS}")
    parts = {name: record.get(name) or "" for name in ("narrative", "instruction")}
    for name, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f"field {name!r}: got {type(value).__name__}, expected a string")
    turns = record.get("turns")
    # No string: it would be a turn a letter.
    if not isinstance(turns, list) or not turns:
        raise ValueError("field 'turns': expected a list of at least one utterance")
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("field 'turns': every utterance must be a string that is not empty")
    response = record.get("response")
    if response is not None and not isinstance(response, str):
        raise ValueError(f"field 'response': got {type(response).__name__}, expected a string")
    for name, texts in {**parts, "turns": "".join(turns), "response": response or ""}.items():
        # SentencePiece refuses such a text with an error that names no field.
        if not json_lines.is_whole(texts):
            raise ValueError(f"field {name!r}: not valid text (half a character)")

    target_ids = None if response is None else (*vocabulary.encode(response), vocabulary.eos_id)
    given = record.get("id")
    name = default_id if given is None else str(given)
    if isinstance(vocabulary, ByteLevelVocabulary):
        first = "\n".join(filter(None, (*parts.values(), turns[0])))
        history = prost_text.history_ids([first, *turns[1:]], vocabulary, inputs_length)
        text = prost_text.history_text([first, *turns[1:]])
        return Row(name, text, tuple(history.ids), response, target_ids, history.cut)

    def count(text: str) -> int:
        return len(vocabulary.encode(text))

    kept = formatting.drop_oldest_turns(
        parts["narrative"], parts["instruction"], turns, inputs_length, count, separators
    )
    text = formatting.cosmo_input(parts["narrative"], parts["instruction"], kept, separators)
    ids = vocabulary.encode(text)
    too_long = len(ids) >= inputs_length  # EOS needs a place
    # The front is cut, because the answer is to the newest words.
    ids = [*(ids[-(inputs_length - 1) :] if too_long else ids), vocabulary.eos_id]
    cut = too_long or len(kept) < len(turns)
    return Row(name, text, tuple(ids), response, target_ids, cut)


def warn_of_unknown_fields(names: Mapping[str, int]) -> None:
    """Log one warning that names the fields that no record has. `names` counts their records."""
    if names:
        found = []
        for name, count in sorted(names.items()):
            near = difflib.get_close_matches(name, sorted(KNOWN), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"{shown(name)} ({count} records{hint})")
        more = f" and {len(found) - FIELDS_NAMED} more" if len(found) > FIELDS_NAMED else ""
        log.warning(
            "fields that are ignored: %s%s; known are %s",
            ", ".join(found[:FIELDS_NAMED]),
            more,
            ", ".join(sorted(KNOWN)),
        )


def automatic_ids(given: Iterable[str]) -> str:
    """Return what to put before a record's number so that it equals none of the `given` ids."""
    marks = [len(found[1]) + 1 for found in map(_AUTOMATIC.fullmatch, given) if found]
    return "#" * max(marks, default=0)


class _Survey:
    """Facts about a whole file: the ids that it gives, those given twice, its unknown fields."""

    def __init__(self) -> None:
        # 24 bytes a record, because files have any size: a hash of its id, its line, its start. Two
        # of a million 64-bit hashes are equal by chance in 1 of 37 million files.
        self.hashes, self.lines, self.starts = array("q"), array("q"), array("q")
        self.unknown: Counter[str] = Counter()
        self.prefix = ""

    def add(self, piece: record_sources.Piece) -> None:
        """Add one line to the survey."""
        try:
            record = json_lines.value(piece.lines[0])
        except ValueError:
            return  # rejected when it is read
        if not isinstance(record, dict):
            return
        self.unknown.update(record.keys() - KNOWN)
        if record.get("id") is not None:
            name = str(record["id"])
            self.hashes.append(hash(name))
            self.lines.append(piece.line + 1)
            self.starts.append(piece.start)
            self.prefix = max(self.prefix, automatic_ids([name]), key=len)

    def warn(self, path: str) -> None:
        """Log a warning for ids that are given twice, and one for unknown fields."""
        warn_of_unknown_fields(self.unknown)
        # Stable: of equal ids the earlier line stays before the later one.
        order = np.argsort(np.asarray(self.hashes), kind="stable")
        same = np.flatnonzero(np.diff(np.asarray(self.hashes)[order]) == 0)
        if not same.size:
            return
        pairs = [(order[i], order[i + 1]) for i in same]
        # In the order of the file, not of the hashes.
        pairs.sort(key=lambda pair: pair[1])
        named = []
        with record_sources.open_input(path) as file:
            for first, again in pairs[:DOUBLES_NAMED]:
                # Only hashes were kept, so the few names shown are read again.
                file.seek(self.starts[again])
                name = str(json_lines.value(file.readline())["id"])
                lines = f"lines {self.lines[first]} and {self.lines[again]}"
                named.append(f"{shown(name)} ({lines})")
        more = f" and {len(pairs) - len(named)} more" if len(pairs) > len(named) else ""
        log.warning(
            "%s: ids given twice: %s%s; their answers can be told apart by their order only",
            path,
            ", ".join(named),
            more,
        )


def source(
    path: str,
    vocabulary: Vocabulary,
    inputs_length: int,
    separators: formatting.Separators = formatting.Separators(),
    mode: str = "predict",
) -> record_sources.Source:
    """Return the records of a JSON lines file, compressed or not, for `bulk.answer_source`.

    The file is read once to count and to fingerprint it, and to name ids that are given twice. A
    record without an id gets its number, with a # before it if the file gives such ids. A line that
    cannot be used is rejected, a blank one skipped; with `mode="score"` a record needs a response
    to score. Raises UserError if the file cannot be read or has no lines.
    """
    survey = _Survey()

    def items(piece: record_sources.Piece, number: int) -> list[Row | record_sources.Rejected]:
        (line,) = piece.lines
        if not line.strip():
            return []
        try:
            record = json_lines.value(line)
            found = row(record, vocabulary, inputs_length, separators, f"{survey.prefix}{number}")
            if mode == "score" and found.target_ids is None:
                raise ValueError("field 'response': missing, and MODE=score needs it")
            return [found]
        except ValueError as error:
            kept = record_sources.text_of(piece.lines)
            return [record_sources.Rejected(piece.line + 1, str(error), kept)]

    found = record_sources.file_source(
        path,
        items,
        expected=f"JSON lines of {FIELDS}",
        # Other separators make other inputs: such an output must not be continued.
        identity={"separators": dataclasses.asdict(separators)},
        survey=survey.add,
    )
    survey.warn(path)
    return found
