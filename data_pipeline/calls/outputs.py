"""What a run leaves: records and rejections in the order of the input, whenever they were done.

Results wait in memory until all before them are there (the run begins no triple further ahead than
its window), then go to `NAME.jsonl.partial`; `progress.json` says how far those reach, so that the
next start goes on there. At the end they take their names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError

FILES = ("soda", "provenance", "rejected")
Lines = dict[str, str]  # file of FILES -> a line for it, without its end


@dataclasses.dataclass(frozen=True)
class Result:
    """The lines of one record, or those to write instead if another record had its `key`."""

    lines: Lines
    key: bytes = b""
    duplicate: Lines = dataclasses.field(default_factory=dict)

    def keep_first(self, keys: set[bytes]) -> Lines:
        """Return the lines to write, and add the key to those of earlier records."""
        if self.key in keys:
            return self.duplicate
        if self.key:
            keys.add(self.key)
        return self.lines


class Outputs:
    """The files of one run in `folder`. `about` tells the run from others: what it is made of.

    A start with other `about`, or a smaller `total` of triples than are written, begins the files
    anew (the journal still answers what it can).
    `key_of` gives the key of a row of soda.jsonl (see `Result`). `next` is the number of the first
    triple whose result is not yet written.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        total: int,
        key_of: Callable[[dict], bytes] = lambda row: b"",
        save_seconds: float = 10,
    ):
        self.folder, self.about, self.save_seconds = Path(folder), about, save_seconds
        self._waiting: dict[int, Result] = {}
        self._keys: set[bytes] = set()
        self._broken = False
        self.next, self.total = 0, total
        self.counts = dict.fromkeys(FILES, 0)
        sizes = self._resume()
        self._files = {}
        for name in FILES:
            path = self._partial(name)
            file = open(path, "ab")  # noqa: SIM115
            file.truncate(sizes.get(name, 0))
            self._files[name] = file
        with open(self._partial("soda"), encoding="utf-8") as rows:
            self._keys = {key for row in rows if (key := key_of(json.loads(row)))}
        self._saved = time.monotonic()

    def add(self, number: int, result: Result) -> None:
        """The result of triple `number`. Raises UserError; then nothing more is saved."""
        self._waiting[number] = result
        while (result := self._waiting.pop(self.next, None)) is not None:
            for name, line in result.keep_first(self._keys).items():
                try:
                    self._files[name].write(line.encode() + b"\n")
                except OSError as error:
                    raise self._lost(name, error) from error
                self.counts[name] += 1
            self.next += 1
        if time.monotonic() - self._saved > self.save_seconds:
            self.save()

    def save(self) -> None:
        """Make what is written so far the place to go on from. Raises UserError.

        After a failed write, which may have left half a triple, the place before stays.
        """
        if self._broken:
            return
        sizes = {}
        for name, file in self._files.items():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise self._lost(name, error) from error
            sizes[name] = file.tell()
        state = {"next": self.next, "counts": self.counts, "sizes": sizes, "about": self.about}
        write_atomic(self.folder / "progress.json", json.dumps(state, indent=1))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """All triples are done: give the files their names."""
        assert not self._waiting
        self.save()
        self.close()
        for name in FILES:
            self._partial(name).replace(self.folder / f"{name}.jsonl")
        (self.folder / "progress.json").unlink()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # told by `save`, and what it saved is whole
                file.close()

    def _lost(self, name: str, error: OSError) -> UserError:
        self._broken = True
        return UserError(
            f"cannot write {self._partial(name)}: {error.strerror}. No answer is lost: make room, "
            "and give the same command again"
        )

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl.partial"

    def _resume(self) -> dict[str, int]:
        try:
            state = json.loads((self.folder / "progress.json").read_text())
            sizes = state["sizes"]
            whole = all(self._partial(n).stat().st_size >= sizes[n] for n in FILES)
            same = state["about"] == json.loads(json.dumps(self.about))
            if not (same and whole and state["next"] <= self.total):
                return {}
            self.next, self.counts = state["next"], state["counts"]
            return sizes
        except (OSError, ValueError, KeyError):
            return {}  # nothing to go on from: the journal has all answers
