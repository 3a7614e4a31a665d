"""Write results in the order of the input, whenever they come, and resume after any stop.

Results wait in memory until all before them are there, then go to NAME.jsonl.partial.
`progress.json` stores how far those files are whole. At the end the files get their names.
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

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError

FILES = ("soda", "provenance", "rejected")
SAVE_SECONDS = 10  # a kill repeats this much writing; its answers are in the journal
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
    """The files of one run in `folder`, made from the settings `about`.

    `next` is the number of the first record whose result is not written. A start with other
    settings, or with a smaller `total` than is written, begins the files anew.

    `key_of` returns the key of a row of soda.jsonl (see `Result`).
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        total: int,
        key_of: Callable[[dict], bytes] = lambda row: b"",
    ):
        self.folder, self.about = Path(folder), about
        self._waiting: dict[int, Result] = {}
        self._broken = False
        self.next, self.total = 0, total
        sizes = self._resume()
        self._files = {}
        for name in FILES:
            file = open(self._partial(name), "ab")  # noqa: SIM115 `close` closes it
            # A kill may have left lines after the last save: their records are written again.
            file.truncate(sizes.get(name, 0))
            self._files[name] = file
        # Read back instead of saved, so that keys and rows cannot differ.
        with open(self._partial("soda"), encoding="utf-8") as rows:
            self._keys = {key for row in rows if (key := key_of(json.loads(row)))}
        self._saved = time.monotonic()

    def add(self, number: int, result: Result) -> None:
        """Add the result of record `number`. Raises UserError; then nothing more is saved."""
        self._waiting[number] = result
        while (result := self._waiting.pop(self.next, None)) is not None:
            # Duplicates are found here, because here the order is that of the input.
            for name, line in result.keep_first(self._keys).items():
                try:
                    self._files[name].write(json_lines.encode(line) + b"\n")
                except OSError as error:
                    raise self._lost(name, error) from error
            self.next += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Store how far the files are whole: a later start resumes there. Raises UserError."""
        if self._broken:
            return  # the failed write may have left half a record: the place before stays
        sizes = {}
        for name, file in self._files.items():
            try:
                # Synced before progress.json names the size, else a power cut could lose lines.
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise self._lost(name, error) from error
            sizes[name] = file.tell()
        state = {"next": self.next, "sizes": sizes, "about": self.about}
        write_atomic(self.folder / "progress.json", json.dumps(state, indent=1))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give the files their names. All records must be there."""
        assert not self._waiting
        self.save()
        self.close()
        for name in FILES:
            self._partial(name).replace(self.folder / f"{name}.jsonl")
        (self.folder / "progress.json").unlink()
        durable.sync(self.folder)  # a power loss after the command's end changes nothing

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # `save` raised it, and what it saved is whole
                file.close()

    def _lost(self, name: str, error: OSError) -> UserError:
        self._broken = True
        return UserError(
            f"cannot write {self._partial(name)}: {error.strerror}. No answer is lost: free some "
            "space, then give the same command again"
        )

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl.partial"

    def _resume(self) -> dict[str, int]:
        """Return the sizes of the files up to the saved place, {} if there is none of this run."""
        try:
            state = json.loads((self.folder / "progress.json").read_text())
            sizes = state["sizes"]
            whole = all(self._partial(n).stat().st_size >= sizes[n] for n in FILES)
            # Through JSON, because tuples come back as lists.
            same = state["about"] == json.loads(json.dumps(self.about))
            if not (same and whole and state["next"] <= self.total):
                return {}
            self.next = state["next"]
            return sizes
        except (OSError, ValueError, KeyError):
            return {}  # a first start, or a damaged file: the journal has all answers
