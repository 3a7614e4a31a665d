"""Map Canary's labels to the ids of records, also labels that number the rows of soda.jsonl.

`python -m canary label` knows no ids of ours: it numbers the rows of its input from 0. Such a file
numbers the rows of a folder's soda.jsonl, whose lines in provenance.jsonl have the ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError

KEPT = "canary_labels.json"  # in a run's folder: the labels by id, and the hash of their file


def read_labels(path: Path) -> dict[str, str]:
    """Read {id: label} from JSON lines of id and label. Raises UserError."""
    labels = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                labels[str(row["id"])] = str(row["label"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", setting="canary_labels") from error
    except (ValueError, KeyError, TypeError) as error:
        wanted = '{"id": ..., "label": "__casual__"}'
        raise UserError(
            f"{path}:{number}: not {wanted} ({error})", setting="canary_labels"
        ) from error
    return labels


def by_id(path: Path, ids: Sequence[str | None], where: str, *, own: bool = True) -> dict[str, str]:
    """Return the labels of the file `path` by the ids of the records.

    Args:
        ids: those of the rows in `where`, in their order; None for a broken row.
        own: the ids are of provenance.jsonl. Else they are numbers too (`original_index`), and
            count as ids only if all of them have a label.

    Raises:
        UserError: the file has no labels, no id is known, or the file numbers other rows.
    """
    labels = read_labels(path)
    rows = {str(number) for number, name in enumerate(ids) if name is not None}
    by_row = {name: labels.get(str(number)) for number, name in enumerate(ids) if name is not None}
    # Published rows have `original_index` alone. Row numbers go first, because `canary label`
    # writes them.
    if not own and labels.keys() == rows:
        return by_row
    known = set(ids) - {None}
    matching = labels.keys() & known
    if matching and (own or matching == known):
        return labels
    if not are_rows(labels):
        raise UserError(
            f"{path}: none of its {len(labels)} ids is one of the {len(ids)} rows of {where}. Give "
            "ids of provenance.jsonl, or row numbers from 0",
            setting="canary_labels",
        )
    # Fewer or more labels than rows: they may number another file, and would drop wrong dialogues.
    if labels.keys() != rows:
        raise UserError(
            f"{path} numbers {len(labels)} rows, {where} has {len(rows)}: label exactly that file",
            setting="canary_labels",
        )
    return by_row


def are_rows(labels: Mapping[str, str]) -> bool:
    """Return whether all ids can be row numbers: ours have 16 hexadecimal digits."""
    return all(name.isdecimal() and len(name) < 16 for name in labels)


def of_run(path: Path, folder: Path) -> dict[str, str]:
    """Return the labels by id for a run in `folder`: of its soda.jsonl before the run.

    Raises UserError.
    """
    try:
        # A run with labels leaves fewer rows in soda.jsonl, so a second start could no longer
        # read row numbers. `keep` has stored the ids.
        kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        if kept["file"] == digest(path):
            return kept["labels"]
    except (OSError, ValueError, KeyError):
        pass  # the first start with labels
    origins = folder / "provenance.jsonl"
    if not origins.exists():
        labels = read_labels(path)
        if are_rows(labels):
            raise UserError(
                f"{path} numbers rows, but {folder} has no records yet: run co3 without it, label "
                "soda.jsonl, then give the same command with it",
                setting="canary_labels",
            )
        return labels
    with open(origins, encoding="utf-8") as lines:
        ids = [json.loads(line)["id"] for line in lines]
    return by_id(path, ids, str(folder / "soda.jsonl"))


def keep(path: Path, labels: Mapping[str, str], folder: Path) -> None:
    """Write the labels by id, and the hash of the file `path`, to `folder` (see `of_run`)."""
    text = json.dumps({"file": digest(path), "labels": labels}, indent=1)
    write_atomic(folder / KEPT, text)


def digest(path: Path) -> str:
    """Return 16 hexadecimal digits of a hash of a file. Raises UserError."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", setting="canary_labels") from error
