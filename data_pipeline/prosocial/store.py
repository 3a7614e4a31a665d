"""Store the outcome of each step of a run in one file, and find it again at the next start.

`steps/NN-name.jsonl` has a line for each dialogue that continues, and for each that does not. The
file is written once and atomically. A start either finds the whole outcome of a step, or makes it
anew from the journal and the answers. An outcome that exists is never changed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks.record_files import read_records

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The dialogues after a step, and those that it quarantined: {id, stage, reason, ...}."""

    records: tuple[Record, ...]
    rejected: tuple[Record, ...] = ()


class Store:
    """The folder of one run."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, kind: str, name: str, ending: str = ".jsonl") -> Path:
        """Return the file of a step: `kind` is steps, tasks or answers."""
        return self.folder / kind / f"{name}{ending}"

    def read(self, name: str) -> Outcome | None:
        """Return the stored outcome of a step, None if it has none. Raises DataError."""
        path = self.path("steps", name)
        if not path.exists():
            return None
        records, rejected, count = [], [], None
        for place, line in read_records(path):
            if not isinstance(line, dict) or not {"record", "rejected", "count"} & line.keys():
                raise place.error("a broken line", str(line)[:80], "a line of a step")
            if "count" in line:
                count = line["count"]
            elif "record" in line:
                records.append(line["record"])
            else:
                rejected.append(line["rejected"])
        if count != len(records) + len(rejected):
            raise DataError.at(
                path, None, "the file is cut", got=f"{len(records) + len(rejected)} lines",
                expected=f"{count}", remedy="Remove it: the same command makes it anew.",
            )  # fmt: skip
        return Outcome(tuple(records), tuple(rejected))

    def write(self, name: str, outcome: Outcome) -> None:
        """Store the outcome of a step."""
        path = self.path("steps", name)
        durable.make_folder(path.parent)
        values: list[Record] = [{"record": record} for record in outcome.records]
        values += [{"rejected": one} for one in outcome.rejected]
        write_atomic(path, json_lines.lines([{"count": len(values)}, *values]))

    def salt(self) -> str:
        """Return the secret that pseudonyms are made with; the first call makes it."""
        path = self.folder / "pseudonyms.key"
        if not path.exists():
            # Readable by its owner alone: with it, names can be tried one by one.
            descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(16))
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.new", path)
        return path.read_text().strip()

    def judges(self) -> list[str]:
        """Return the names of all who answered, without lines that cannot be read."""
        found = set()
        for file in (self.folder / "answers").glob("*.jsonl"):
            for line in file.read_bytes().splitlines():
                try:
                    found.add(str(json_lines.value(line)["judge"]))
                except (ValueError, KeyError, TypeError):
                    continue
        return sorted(found)

    def settle(self, about: Record) -> None:
        """Store the settings of a first start; UserError if a later one has others."""
        path = self.folder / "run.json"
        text = json.dumps(about, indent=1, ensure_ascii=False)
        if not path.exists():
            write_atomic(path, text)
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): give another folder") from error
        # Through JSON, because tuples come back as lists.
        now = json.loads(text)
        if earlier != now:
            name = next(n for n in {**earlier, **now} if earlier.get(n) != now.get(n))
            raise UserError(
                f"{self.folder} has a run with {name}={earlier.get(name)!r}, not "
                f"{now.get(name)!r}: start as that run did, or give another folder",
                setting="output",
            )


def rejection(id: str, stage: str, reason: str, known: Record) -> Record:
    """Return the line of a quarantined record."""
    return {
        "id": id,
        "stage": stage,
        "reason": reason,
        **{k: v for k, v in known.items() if k != "id"},
    }


def reasons(rejected: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Return the numbers of quarantined records by stage and reason."""
    table: dict[str, dict[str, int]] = {}
    for one in rejected:
        of_stage = table.setdefault(one["stage"], {})
        of_stage[one["reason"]] = of_stage.get(one["reason"], 0) + 1
    return table
