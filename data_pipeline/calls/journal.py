"""Keep every answer that was paid for, in one SQLite table, before anything uses it.

`journal/calls.sqlite` has one row a call: answers, and failures that may have been billed. A row is
committed when the call is sent, with the most that it may cost: a call that a kill breaks off is
charged. It is replaced as soon as the answer arrives, so a killed process loses no answer. After
`Journal.sync` a row survives a power loss too. A power loss may leave calls in flight uncharged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import socket
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cosmo.engine.base import durable
from cosmo.engine.base.errors import UserError
from data_pipeline.calls import former_journal

log = logging.getLogger("data_pipeline")

NAME = "calls.sqlite"
# The answer stands last, because SQLite then sums the other columns without reading it.
_TABLES = """
CREATE TABLE IF NOT EXISTS calls (number INTEGER PRIMARY KEY, key BLOB NOT NULL, id TEXT NOT NULL,
    stage TEXT NOT NULL, attempt INTEGER NOT NULL, kind TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, reason TEXT NOT NULL,
    answer BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS answers ON calls (key) WHERE kind = 'answer';
"""
_COLUMNS = "key, id, stage, attempt, kind, prompt_tokens, completion_tokens, reason, answer"
SENT = "sent"  # the kind of a row whose call is under way
BROKEN_OFF = "the run ended while this call was under way"
_INSERT = f"INSERT OR IGNORE INTO calls (number, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

_REPLACE = _INSERT.replace("OR IGNORE", "OR REPLACE")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One answer, or one failure to get one (`kind`), with the server's text (`raw`).

    A failure has a `reason` and is never used as an answer. Its tokens are the most that it may
    have been billed for.
    """

    key: str
    id: str
    stage: str
    attempt: int
    kind: str
    raw: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""


class Journal:
    """The journal of one run, open in one process. `with Journal(folder) as journal:`.

    Raises UserError if another process has it open, or if it cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.path = self.folder / NAME

    def __enter__(self) -> Journal:
        try:
            durable.make_folder(self.folder)
            self._lock = _lock(self.folder)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written to: {error.strerror}") from error
        self._database = self._log = None
        self._sync: asyncio.Task | None = None  # the one in progress, and the one that waits
        self._next_sync: asyncio.Task | None = None
        try:
            with self._errors():
                self._open()
                # SQLite's log, which holds the latest commits. None where it cannot use one: there
                # each commit is synced.
                with contextlib.suppress(FileNotFoundError):
                    self._log = os.open(f"{self.path}-wal", os.O_RDONLY)
                durable.sync(self.folder)
        except BaseException:
            if self._log is not None:
                os.close(self._log)
            if self._database is not None:
                self._database.close()
            self._lock.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._log is not None:
            os.close(self._log)
        self._database.close()  # moves what the log holds into the database, and syncs it
        self._lock.close()

    def get(self, key: str) -> Entry | None:
        """Return the latest answer to a request, or None if there is none that can be read."""
        query = f"SELECT {_COLUMNS} FROM calls WHERE key = ? AND kind = 'answer' ORDER BY number"
        name = (bytes.fromhex(key),)
        with self._errors():
            try:
                row = self._database.execute(f"{query} DESC LIMIT 1", name).fetchone()
                return None if row is None else _entry(row)
            except (sqlite3.DatabaseError, *_UNREADABLE) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise  # the disk failed, not this answer
                log.warning("%s: an answer is damaged (%s): asked again", self.path, error)
                return None

    def begin(self, entry: Entry) -> int:
        """Commit the entry of a call before it is sent; return its number for `end`.

        Its tokens are the most that the call may take. If no `end` follows, the next start counts
        the call as a failure.
        """
        with self._errors():
            row = _row(dataclasses.replace(entry, kind=SENT))
            return self._database.execute(_INSERT, (None, *row)).lastrowid

    def end(self, number: int, entry: Entry | None) -> None:
        """Commit the entry of a call that ended, or remove its row if it cost nothing (None)."""
        if entry is not None:
            self.append(entry, number)
            return
        with self._errors():
            self._database.execute("DELETE FROM calls WHERE number = ?", (number,))

    def append(self, entry: Entry, number: int | None = None) -> None:
        """Commit an entry. A kill of the process does not lose it; see `sync` for a power loss.

        `number` is that of its row, if it was begun.
        """
        with self._errors():
            statement = _INSERT if number is None else _REPLACE
            self._database.execute(statement, (number, *_row(entry)))

    async def sync(self) -> None:
        """Wait until all that is committed survives a power loss. Raises UserError."""
        # One at a time: a sync takes milliseconds, and all that arrives meanwhile shares the next.
        if self._next_sync is None:
            self._next_sync = asyncio.create_task(self._sync_after(self._sync))
            # Its error is no news to a loop whose waiting calls were all cancelled.
            self._next_sync.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._next_sync)

    async def _sync_after(self, earlier: asyncio.Task | None) -> None:
        if earlier is not None and not earlier.done():
            await asyncio.wait([earlier])
        self._sync, self._next_sync = self._next_sync, None
        if self._log is not None:
            with self._errors():
                # In a thread, so that the event loop keeps running. It syncs the commits of any
                # descriptor.
                await asyncio.to_thread(os.fdatasync, self._log)

    def spent(self) -> dict[str, dict[str, dict[str, int]]]:
        """Sum calls, prompt_tokens and completion_tokens of all starts, per stage and kind."""
        table: dict[str, dict[str, dict[str, int]]] = {}
        columns = ("calls", "prompt_tokens", "completion_tokens")
        query = (
            "SELECT stage, kind, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) "
            "FROM calls GROUP BY 1, 2 ORDER BY 1, 2"
        )
        with self._errors():
            for stage, kind, *numbers in self._database.execute(query):
                table.setdefault(stage, {})[kind] = dict(zip(columns, numbers, strict=True))
        return table

    def tokens_spent(self) -> tuple[int, int]:
        """Return the tokens of all starts, in and out; of failures too, which may be charged."""
        kinds = [kind for stages in self.spent().values() for kind in stages.values()]
        prompt, completion = (
            sum(kind[f"{name}_tokens"] for kind in kinds) for name in ("prompt", "completion")
        )
        return prompt, completion

    def __len__(self) -> int:
        """Count the requests that have an answer."""
        query = "SELECT COUNT(DISTINCT key) FROM calls WHERE kind = 'answer'"
        with self._errors():
            return self._database.execute(query).fetchone()[0]

    def _open(self) -> None:
        """Open the database. One that is damaged is set aside, and what can be read is copied."""
        fault = ""
        try:
            self._database = _connect(self.path)
            # SQLite has no checksums, but this finds lost and exchanged pages. It reads the whole
            # file, about a second for each GB.
            fault = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
            fault = "" if fault == "ok" else fault
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # a full disk or a missing permission is no damage
            fault = str(error)
        earlier = sorted((self.folder / "damaged").glob(f"{NAME}.[0-9][0-9][0-9]"))
        if fault:
            aside = self.folder / "damaged" / f"{NAME}.{len(earlier):03d}"
            log.warning("%s is damaged (%s): it is kept as %s", self.path, fault, aside)
            if self._database is not None:
                self._database.close()
            aside.parent.mkdir(exist_ok=True)
            # The database goes last, so that a kill in between is repaired by the next start.
            for suffix in ("-wal", "-shm", ""):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
            self._database = _connect(self.path)
            earlier.append(aside)
        if not self._database.execute("PRAGMA user_version").fetchone()[0]:
            self._fill(earlier[-1] if earlier else None)
        # The lock is ours, so no call of another process is under way.
        self._database.execute(
            "UPDATE calls SET kind = 'failure', reason = ? WHERE kind = ?", (BROKEN_OFF, SENT)
        )

    def _fill(self, damaged: Path | None) -> None:
        """Copy what earlier files hold into a new database: a damaged one, the former format."""
        # One transaction with its mark, so that a kill here leaves all to the next start.
        self._database.execute("BEGIN")
        if damaged:
            for row in _readable_rows(damaged):
                self._database.execute(_INSERT, row)
            log.warning("%s: read %d answers; others are asked again", damaged, len(self))
        for fields in former_journal.entries(self.folder):
            entry = Entry(**fields)
            # The damaged database had copied these already, so they are not counted twice.
            if not damaged or (entry.kind == "answer" and self.get(entry.key) is None):
                self._database.execute(_INSERT, (None, *_row(entry)))
        self._database.execute("PRAGMA user_version = 1")
        self._database.execute("COMMIT")
        if shards := former_journal.shards(self.folder):
            log.info(
                "%s has the answers of the former format (%s ...), %d in all; those files may go",
                *(self.path, shards[0].name, len(self)),
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn an error of the database into a UserError: it is no fault of one triple."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"cannot use {self.path}: {error}. No answer that was journaled is lost: if the "
                "disk is full make room, then give the same command again"
            ) from error


def read_entries(folder: Path) -> list[Entry]:
    """Return all entries of a journal that no process has open, oldest first."""
    with contextlib.closing(_connect(Path(folder) / NAME)) as database:
        rows = database.execute(f"SELECT {_COLUMNS} FROM calls ORDER BY number")
        return [_entry(row) for row in rows]


# Errors of reading a row whose bytes were changed. zlib's checksum finds those of an answer.
_UNREADABLE = (zlib.error, ValueError, TypeError, AttributeError)


def _text(data: bytes) -> str:
    # SQLite's own decoding fails on text with a changed bit.
    return data.decode("utf-8", "replace")


def _connect(path: Path) -> sqlite3.Connection:
    # isolation_level=None: each statement is a transaction of its own.
    database = sqlite3.connect(path, isolation_level=None)
    database.text_factory = _text
    try:
        database.execute("PRAGMA journal_mode=WAL")
        # A commit is written but not synced, which survives a kill of the process. FULL would sync
        # each commit, some milliseconds each at hundreds of answers a second: `sync` does it for
        # many at once.
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(_TABLES)
    except BaseException:
        database.close()
        raise
    return database


def _lock(folder: Path) -> TextIO:
    """Hold `folder` for this process. Raises OSError, or UserError that names the holder."""
    lock = open(folder / ".lock", "a+")  # noqa: SIM115 it is held until the journal closes
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"{folder} is in use by {holder}: stop it, or give another folder", setting="output"
        ) from error
    except OSError:
        with contextlib.suppress(OSError):  # closing writes again what was not written
            lock.close()
        raise
    return lock


def _row(entry: Entry) -> tuple:
    # Half a surrogate pair is no text for SQLite.
    texts = (entry.id, entry.stage, entry.kind, entry.reason)
    name, stage, kind, reason = (text.encode("utf-8", "replace").decode() for text in texts)
    # Compressed, an answer takes 60% of its size, and zlib adds a checksum.
    answer = zlib.compress(entry.raw.encode("utf-8", "surrogatepass"), 4)
    tokens = (entry.prompt_tokens, entry.completion_tokens)
    return (bytes.fromhex(entry.key), name, stage, entry.attempt, kind, *tokens, reason, answer)


def _entry(row: tuple) -> Entry:
    key, name, stage, attempt, kind, prompt, completion, reason, answer = row
    raw = zlib.decompress(answer).decode("utf-8", "surrogatepass")
    return Entry(key.hex(), name, stage, attempt, kind, raw, prompt, completion, reason)


def _readable_rows(path: Path) -> Iterator[tuple]:
    """Yield the rows of a damaged database that can be read, from both ends up to the damage."""
    for order in ("ASC", "DESC"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.text_factory = _text
            try:
                query = f"SELECT number, {_COLUMNS} FROM calls ORDER BY number {order}"
                for number, *row in database.execute(query):
                    with contextlib.suppress(*_UNREADABLE):
                        yield number, *_row(_entry(tuple(row)))
                return
            except sqlite3.Error:
                continue  # rows that come from both ends have one number, and are kept once
