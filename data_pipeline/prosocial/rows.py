"""Make the rows of ProsocialDialog's hub format, one for each response, and their provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from cosmo.tasks.safety import aggregate
from data_pipeline.prosocial.people import Record, check_ends

SPLITS = ("train", "validation", "test")


def rots_of(record: Record, row: int) -> list[str]:
    """Return the rules of thumb of a row: rounds 1, 1, 2 ... for rows 0, 1, 2 ..."""
    # The first round is written on u1 to u3, so its rules are about both of its contexts.
    return record["rounds"][max(row - 1, 0)]["rots"]


def rows(record: Record, dialogue_id: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a labelled dialogue."""
    check_ends(record)
    last = len(record["turns"]) // 2 - 1
    for row in range(last + 1):
        votes = record["votes"][row]
        given = [vote["vote"] for vote in votes]
        yield {
            "context": record["turns"][2 * row],
            "response": record["turns"][2 * row + 1],
            "rots": rots_of(record, row) or None,
            "safety_label": aggregate(given),
            "safety_annotations": given,
            "safety_annotation_reasons": [vote["reason"] for vote in votes],
            "source": record["source"],
            "etc": record["etc"],
            "dialogue_id": dialogue_id,
            "response_id": row,
            "episode_done": row == last,
        }


def by_split(records: Iterable[Record]) -> dict[str, list[tuple[Record, list[dict[str, Any]]]]]:
    """Return (dialogue, its rows) by split; ids count the dialogues of a split from 0."""
    made: dict[str, list] = {split: [] for split in SPLITS}
    for record in records:
        of_split = made[record["split"]]
        of_split.append((record, list(rows(record, len(of_split)))))
    return made


def provenance(record: Record, dialogue_id: int) -> dict[str, Any]:
    """Return the line of provenance.jsonl: how the dialogue came about."""
    kept = {name: value for name, value in record.items() if name not in ("turns", "id")}
    return {"dialogue_id": dialogue_id, "id": record["id"], **kept}
