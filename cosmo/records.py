"""Plain dialogue records to rows that the engine answers, without SeqIO or TensorFlow."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.data.datasets import Row
from cosmo.engine.infer import lines, shards
from cosmo.tasks import formatting

FIELDS = "{narrative, instruction, turns}"


def row(
    record: Mapping[str, Any],
    vocabulary: Vocabulary,
    inputs_length: int,
    separators: formatting.Separators = formatting.Separators(),
    default_id: str = "0",
) -> Row:
    """A record {turns, narrative?, instruction?, response?, id?} as the model reads it.

    Oldest turns are left out, whole, until the rest fits `inputs_length` tokens. Raises ValueError
    that names the field that is wrong.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"got {type(record).__name__}, expected an object {FIELDS}")
    unknown = set(record) - {"id", "narrative", "instruction", "turns", "response"}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}, expected {FIELDS}")
    parts = {name: record.get(name) or "" for name in ("narrative", "instruction")}
    for name, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f"field {name!r}: got {type(value).__name__}, expected a string")
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError("field 'turns': expected a list of at least one utterance")
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("field 'turns': every utterance must be a string that is not empty")
    response = record.get("response")
    if response is not None and not isinstance(response, str):
        raise ValueError(f"field 'response': got {type(response).__name__}, expected a string")

    def count(text: str) -> int:
        return len(vocabulary.encode(text))

    kept = formatting.drop_oldest_turns(
        parts["narrative"], parts["instruction"], turns, inputs_length, count, separators
    )
    text = formatting.cosmo_input(parts["narrative"], parts["instruction"], kept, separators)
    ids = vocabulary.encode(text)
    # What even one turn cannot fit loses its front: the newest words and EOS stay.
    ids = (*ids[-(inputs_length - 1) :], 1) if len(ids) >= inputs_length else (*ids, 1)
    target_ids = None if response is None else (*vocabulary.encode(response), 1)
    name = record.get("id")
    return Row(default_id if name is None else str(name), text, tuple(ids), response, target_ids)


def source(
    path: str,
    vocabulary: Vocabulary,
    inputs_length: int,
    separators: formatting.Separators = formatting.Separators(),
    mode: str = "predict",
) -> shards.Source:
    """The records of a JSON lines file, plain or `.gz`, for `jobs.answer_source`.

    The file is read once to count and to fingerprint it. A line that cannot be used is rejected,
    a blank one skipped; with `mode="score"` a record needs a response to score. Raises UserError if
    the file cannot be read or has no lines.
    """

    def items(piece: lines.Piece, number: int) -> list[Row | shards.Rejected]:
        (line,) = piece.lines
        if not line.strip():
            return []
        try:
            return [_line_row(line, vocabulary, inputs_length, separators, mode, str(number))]
        except (ValueError, RecursionError) as error:
            return [shards.Rejected(piece.line + 1, str(error), lines.text_of(piece.lines))]

    return lines.source(
        path,
        items,
        expected=f"JSON lines of {FIELDS}",
        identity={"separators": dataclasses.asdict(separators)},
    )


def _line_row(line, vocabulary, inputs_length, separators, mode, default_id) -> Row:
    """The row of one line; raises ValueError. Bytes are decoded line by line: one may be bad."""
    try:
        record = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        hint = "; compressed files end in .gz" if line.startswith(b"\x1f\x8b") else ""
        raise ValueError(f"not UTF-8 text{hint}") from error
    json.dumps(record, ensure_ascii=False).encode()  # or half a surrogate pair would pass
    found = row(record, vocabulary, inputs_length, separators, default_id)
    if mode == "score" and found.target_ids is None:
        raise ValueError("field 'response': missing, and MODE=score needs it")
    return found
