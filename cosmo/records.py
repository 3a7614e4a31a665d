"""Plain dialogue records to rows that the engine answers, without SeqIO or TensorFlow."""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cosmo.engine.data import Row
from cosmo.engine.errors import UserError
from cosmo.engine.infer import Vocabulary
from tasks import formatting

log = logging.getLogger("cosmo")

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
    return Row(str(record.get("id", default_id)), text, tuple(ids), response, target_ids)


def read_rows(
    path: str,
    vocabulary: Vocabulary,
    inputs_length: int,
    separators: formatting.Separators,
    rejected: list[dict[str, Any]],
    mode: str = "predict",
) -> Iterator[Row]:
    """The rows of a JSON lines file; a bad line joins `rejected` with its reason.

    With `mode="score"` a record needs a response to score.
    """
    try:
        lines = epath.Path(path).open("rb")
    except OSError as error:
        raise UserError(f"--input={path} cannot be read: {error.strerror or error}") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # Bytes are decoded line by line: one bad line is not the file's end.
                record = json.loads(line.decode("utf-8"))
                found = row(record, vocabulary, inputs_length, separators, str(number - 1))
                if mode == "score" and found.target_ids is None:
                    raise ValueError("field 'response': missing, and MODE=score needs it")
                found.id.encode("utf-8")
            except (ValueError, RecursionError) as error:
                reason = f"{path}:{number}: {error}"
                log.warning("rejected: %s", reason)
                text = line.decode("utf-8", errors="backslashreplace").rstrip("\n")
                rejected.append({"line": number, "reason": reason, "record": text})
            else:
                yield found
