"""The record of one dialogue, and its conversion to and from the rows that SODA publishes.

`soda_row` has the published fields in their order and nothing else. The other fields of a record
go to `provenance`, a file of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

from cosmo.engine.base import json_lines
from cosmo.engine.base.atomic import replacing

SODA_FIELDS = (
    *("head", "relation", "tail", "literal", "narrative", "dialogue", "speakers"),
    *("PersonX", "PersonY", "PersonZ", "original_index", "split"),
    *("head_answer", "pmi_head_answer", "relation_tail_answer", "pmi_relation_tail_answer"),
)
_OURS = {"PersonX": "x", "PersonY": "y", "PersonZ": "z"}  # other fields have the published names
_LISTS = ("dialogue", "speakers")
ROWS_PER_GROUP = 10_000


@dataclasses.dataclass(frozen=True)
class Record:
    """One triple's dialogue, with the fields of the stages that it has passed.

    `dialogue` and `speakers` have an entry for each turn. `interlocutor` is the prompt's name for
    the other speaker ("her coach"). `marks` are faults that a stage accepted. `attempts` counts the
    requests of each stage. `human` has the model's answers on speakers, `scores` the moderation's.
    """

    id: str
    head: str
    relation: str
    tail: str
    literal: str
    x: str
    y: str = ""
    z: str = ""
    original_index: int = 0
    split: str = "train"
    narrative: str = ""
    dialogue: tuple[str, ...] = ()
    speakers: tuple[str, ...] = ()
    head_answer: str = ""
    pmi_head_answer: str = ""
    relation_tail_answer: str = ""
    pmi_relation_tail_answer: str = ""
    interlocutor: str = ""
    marks: tuple[str, ...] = ()
    attempts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    human: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompts: str = ""
    renamed: bool = False


_PROVENANCE = ("id", "interlocutor", "marks", "attempts", "human", "scores", "prompts", "renamed")


def soda_row(record: Record) -> dict[str, Any]:
    """Return the record as SODA publishes it: the same fields, types and order."""
    row = {name: getattr(record, _OURS.get(name, name)) for name in SODA_FIELDS}
    # Lists, because a tuple would not equal what JSON gives back.
    return row | {name: list(row[name]) for name in _LISTS}


def provenance(record: Record) -> dict[str, Any]:
    """Return the fields of a record that SODA does not publish, for a line beside the row."""
    row = {name: getattr(record, name) for name in _PROVENANCE}
    return row | {"original_index": record.original_index, "marks": list(record.marks)}


def from_row(row: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> Record:
    """Return the record of a SODA row and of its provenance, if it has one.

    Raises:
        ValueError: a field is missing or of another type.
    """
    fields: dict[str, Any] = {}
    for name in SODA_FIELDS:
        value = row.get(name)
        wanted = list if name in _LISTS else int if name == "original_index" else str
        # True and False are integers to isinstance.
        if not isinstance(value, wanted) or isinstance(value, bool):
            # Cut to 60 characters, because the value may be a whole dialogue.
            raise ValueError(f"field {name}: wanted {wanted.__name__}, got {value!r:.60}")
        if wanted is list and not all(isinstance(item, str) for item in value):
            raise ValueError(f"field {name}: wanted texts, got {value!r:.60}")
        # Neither UTF-8 nor Parquet can store it.
        if not json_lines.is_whole("".join(value) if wanted is list else str(value)):
            raise ValueError(f"field {name}: half a surrogate pair is no text")
        fields[_OURS.get(name, name)] = tuple(value) if wanted is list else value
    if len(fields["dialogue"]) != len(fields["speakers"]):
        turns, speakers = len(fields["dialogue"]), len(fields["speakers"])
        raise ValueError(f"{turns} turns in dialogue, {speakers} in speakers")
    known = {name: origin[name] for name in _PROVENANCE if name in origin} if origin else {}
    # Published rows have no id of ours.
    known["id"] = str(known.get("id", row["original_index"]))
    if "marks" in known:
        # JSON has lists alone, and records have tuples.
        known["marks"] = tuple(known["marks"])
    return Record(**fields, **known)


def parquet_schema() -> Any:
    """Return the published files' schema, for pyarrow."""
    import pyarrow

    text = pyarrow.string()
    types = {name: pyarrow.list_(text) for name in _LISTS} | {"original_index": pyarrow.int64()}
    return pyarrow.schema([(name, types.get(name, text)) for name in SODA_FIELDS])


def write_parquet(folder: Any, *, wanted: bool = True) -> None:
    """Write soda.parquet from soda.jsonl, with the published schema. Not `wanted`: remove it."""
    if not wanted:
        # An older file would have other rows than soda.jsonl.
        (folder / "soda.parquet").unlink(missing_ok=True)
        return
    import pyarrow
    import pyarrow.parquet

    # A schema of its own, because pyarrow would give an empty column the type null.
    columns = parquet_schema()
    with (
        replacing(folder / "soda.parquet") as partial,
        partial.open("wb") as file,
        (folder / "soda.jsonl").open("rb") as lines,
        pyarrow.parquet.ParquetWriter(file, columns) as writer,
    ):
        # A block is one row group. It bounds the memory, because a corpus may not fit.
        while block := list(itertools.islice(lines, ROWS_PER_GROUP)):
            table = pyarrow.Table.from_pylist([json.loads(line) for line in block], columns)
            writer.write_table(table)
