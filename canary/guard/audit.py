"""Record decisions in a file of JSON lines, each on the disk before the decision takes effect.

A line is one `write` to a file opened for appending, then an fsync. Neither a kill of the process
nor a power loss takes a decision that was acted on. Decisions that wait together share an fsync,
which a thread of its own makes, so that a slow disk stops no other request.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from cosmo.engine.base import durable, json_lines
from cosmo.engine.base.errors import UserError

MODE = 0o600  # lines may hold what people wrote


class LineLog:
    """A file of JSON lines that is only appended to, by any number of coroutines of one loop."""

    def __init__(self, path: str | pathlib.Path):
        """Open the file, or create it. Raises UserError."""
        self.path = pathlib.Path(path).expanduser()
        try:
            # A pipe or a terminal keeps no line, and cannot be synced.
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"cannot write {self.path}: it is no regular file; give a file")
            self._file = self._open()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "line-log")
        self._torn = False  # whether a write has failed: the file may end with half a line
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, MODE)
        try:
            # A power loss may have left half a line: the next one must not continue it.
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                os.write(file, b"\n")
            durable.sync(self.path.parent)
        except BaseException:
            os.close(file)
            raise
        return file

    async def write(self, record: Mapping[str, Any]) -> None:
        """Return once the record is on the disk. Raises OSError.

        It is written also if the caller is cancelled meanwhile.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((json_lines.line(record), done))
        if self._writer is None:
            self._writer = asyncio.ensure_future(self._write_waiting())
        await asyncio.shield(done)

    async def _write_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            data = b"".join(line for line, _ in batch)
            try:
                await loop.run_in_executor(self._thread, self._append, data)
            except Exception as error:  # whatever it is, nobody may wait for ever
                for _, done in batch:
                    done.set_exception(error)
                    # Its caller may have been cancelled, and asyncio would log the error.
                    done.exception()
            else:
                for _, done in batch:
                    done.set_result(None)
        self._writer = None

    def _follow(self) -> None:
        """Open the path anew if its file was moved or removed, as log rotation does."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file)):
                return
        old, self._file = self._file, self._open()
        self._torn = False
        os.close(old)

    def _append(self, data: bytes) -> None:
        self._follow()
        # Readers pass over an empty line, and over half a one that has an end.
        rest = memoryview(b"\n" + data if self._torn else data)
        self._torn = True
        while rest:  # a full disk may take a part
            rest = rest[os.write(self._file, rest) :]
        self._torn = False
        os.fsync(self._file)

    async def close(self) -> None:
        """Write what waits, and close the file."""
        while self._writer is not None:
            await asyncio.wait({self._writer})
        self._thread.shutdown()
        with contextlib.suppress(OSError):
            os.close(self._file)


class NoLog:
    """The log of a guard that was given no file."""

    async def write(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


Log = LineLog | NoLog


def read_lines(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Return the records of a file, without cut lines. Return [] for a missing file."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in pathlib.Path(path).expanduser().read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                value = json_lines.value(line)
                if isinstance(value, dict):
                    found.append(value)
    return found
