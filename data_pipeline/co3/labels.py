"""Canary's labels, by the ids of records, also where the file names the rows of soda.jsonl.

`python -m canary label` knows no ids of ours: it numbers the rows of its input from 0. Such a file
is one of the rows of a folder's soda.jsonl, whose line in provenance.jsonl has the id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError

KEPT = "canary_labels.json"  # in a run's folder: the labels by id, and of which file they are


def by_id(path: Path, ids: Sequence[str | None], where: str, *, own: bool = True) -> dict[str, str]:
    """The labels of the file `path` by the ids of the records.

    Args:
        ids: of the rows in `where`, in their order; None for a row that is none.
        own: the ids are of provenance.jsonl; else they are numbers too (`original_index`), and are
            taken for ids only if all of them have a label.

    Raises:
        UserError: the file is none of labels, no id is known, or there are not as many labels as
            rows, where they are numbered.
    """
    labels = read_labels(path)
    rows = {str(number) for number, name in enumerate(ids) if name is not None}
    if not own and labels.keys() == rows:
        return numbered(labels, ids)
    known = set(ids) - {None}
    matching = labels.keys() & known
    if matching and (own or matching == known):
        return labels
    if not are_rows(labels):
        raise UserError(
            f"--canary_labels={path}: none of its {len(labels)} ids is one of the {len(ids)} rows "
            f"of {where}: ids of provenance.jsonl are wanted, or row numbers from 0"
        )
    if labels.keys() != rows:
        raise UserError(
            f"--canary_labels={path} numbers {len(labels)} rows, {where} has {len(rows)}: label "
            "that very file, all of it"
        )
    return numbered(labels, ids)


def numbered(labels: Mapping[str, str], ids: Sequence[str | None]) -> dict[str, str]:
    """Labels of row numbers as labels of the ids of these rows."""
    return {name: labels[str(n)] for n, name in enumerate(ids) if name is not None}


def are_rows(labels: Mapping[str, str]) -> bool:
    """Whether all ids can be row numbers: ours have 16 hexadecimal digits."""
    return all(name.isdecimal() and len(name) < 16 for name in labels)


def of_run(path: Path, folder: Path) -> dict[str, str]:
    """The labels by id for a run in `folder`, of its soda.jsonl as it is before the run.

    A run replaces soda.jsonl by fewer rows; for another start with the same labels `keep` has
    left what they meant. Raises UserError.
    """
    try:
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
                f"--canary_labels={path} numbers rows, but {folder} has no records yet: run co3 "
                "without it, label soda.jsonl, then give the same command with it"
            )
        return labels
    with open(origins, encoding="utf-8") as lines:
        ids = [json.loads(line)["id"] for line in lines]
    return by_id(path, ids, str(folder / "soda.jsonl"))


def keep(path: Path, labels: Mapping[str, str], folder: Path) -> None:
    """Leave in `folder` what the labels of the file `path` mean (see `of_run`)."""
    text = json.dumps({"file": digest(path), "labels": labels}, indent=1)
    write_atomic(folder / KEPT, text)


def digest(path: Path) -> str:
    """16 hexadecimal digits of a file's content. Raises UserError."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"--canary_labels={path}: {error.strerror}") from error


def read_labels(path: Path) -> dict[str, str]:
    """Canary's labels: JSON lines of id and label. Raises UserError."""
    labels = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                labels[str(row["id"])] = str(row["label"])
    except OSError as error:
        raise UserError(f"--canary_labels={path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}:{number}: not {{"id": ..., "label": "__casual__"}} ({error})'
        ) from error
    return labels
