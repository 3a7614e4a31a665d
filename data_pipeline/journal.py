"""Every answer that was paid for, written down before anything is made of it.

`journal/` holds append-only shards of checksummed entries (`frames`) and an index. An entry is
written with one `write` as soon as its answer is there, so a killed process loses none (the kernel
has it); `fsync` follows every few seconds and at the end, so a machine that loses power loses those
seconds.
The index (SQLite) says where each answered question's entry lies. It is a convenience: what it
lacks is read from the shards at the next start, and a lost one is made anew.

Damage is never silent: a torn tail is moved to `quarantine/` and cut off, a damaged frame further
on is copied there and passed over; the questions concerned are simply asked again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.frames import FIRST, HEADER, LONGEST, Entry, frame_at, pack, scan, unpack

log = logging.getLogger("data_pipeline")

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, shard INTEGER, place INTEGER)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (shard INTEGER PRIMARY KEY, size INTEGER);
CREATE TABLE IF NOT EXISTS spent (stage TEXT, kind TEXT, calls INTEGER, prompt_tokens INTEGER,
    completion_tokens INTEGER, PRIMARY KEY (stage, kind));
"""


class Journal:
    """The journal of one run, held by one process. `with Journal(folder) as journal:`

    Raises UserError if another process holds it, or it cannot be written.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = 1 << 28, fsync_seconds: float = 5):
        self.folder, self.shard_bytes, self.fsync_seconds = Path(folder), shard_bytes, fsync_seconds
        self.damaged = 0  # frames that could not be read
        self._fd: int | None = None  # of the shard that is written
        self._files: dict[int, int] = {}
        self._fresh: dict[bytes, tuple[int, int]] = {}  # not yet in the index
        self._fresh_spent: Counter = Counter()
        self._committed = time.monotonic()

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a+")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(
                f"{self.folder} is in use by {holder}: stop it, or give another --output"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        self._open_index()
        numbers = [number for number, _ in shards(self.folder)]
        self._shard = max(numbers, default=-1)
        if self._shard < 0 or self._path(self._shard).stat().st_size >= self.shard_bytes:
            self._begin(self._shard + 1)
        else:
            self._begin(self._shard)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_synced, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._commit()
        finally:
            os.fsync(self._fd)
            os.close(self._fd)
            for fd in self._files.values():
                os.close(fd)
            self._index.close()
            self._lock.close()

    def get(self, key: str) -> Entry | None:
        """The answer to a question, or None if there is none yet."""
        name = bytes.fromhex(key)
        where = self._fresh.get(name)
        if where is None:
            query = "SELECT shard, place FROM answers WHERE key = ?"
            with self._index_errors():
                where = self._index.execute(query, (name,)).fetchone()
        if where is None:
            return None
        entry = self._read(*where)
        if entry is None or entry.key != key:
            self.damaged += 1
            log.warning("%s: damaged at byte %d, asked again", self._path(where[0]), where[1])
            self._fresh.pop(name, None)
            with self._index_errors():
                self._index.execute("DELETE FROM answers WHERE key = ?", (name,))
            return None
        return entry

    def append(self, entry: Entry) -> None:
        """Write an entry. When this returns a kill of the process no longer loses it."""
        frame = pack(entry)
        try:
            if self._size and self._size + len(frame) > self.shard_bytes:
                self._commit()
                os.fsync(self._fd)
                self._begin(self._shard + 1)
            written = os.write(self._fd, frame)
            if written != len(frame):  # a full disk takes a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise UserError(
                f"cannot write {self._path(self._shard)}: {error.strerror}. Nothing that was "
                "written is lost: make room, and give the same command again"
            ) from error
        self._note(entry, self._shard, self._size)
        self._size += len(frame)
        if len(self._fresh) >= 2000 or time.monotonic() - self._committed > 2:
            self._commit()

    def spent(self) -> dict[str, dict[str, dict[str, int]]]:
        """Per stage and kind of entry: calls, prompt_tokens and completion_tokens of all starts."""
        self._commit()
        table: dict[str, dict[str, dict[str, int]]] = {}
        columns = ("calls", "prompt_tokens", "completion_tokens")
        for stage, kind, *numbers in self._index.execute("SELECT * FROM spent ORDER BY 1, 2"):
            table.setdefault(stage, {})[kind] = dict(zip(columns, numbers, strict=True))
        return table

    def __len__(self) -> int:
        """How many questions are answered."""
        self._commit()
        return self._index.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    # Files.

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.co3j"

    def _begin(self, shard: int) -> None:
        """Open a shard for appending, an empty one with its first line; the one before is closed.

        If that fails the one before stays open. Raises OSError.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        fd = os.open(self._path(shard), flags, 0o644)
        try:
            size = os.fstat(fd).st_size
            if not size and (size := os.write(fd, FIRST)) != len(FIRST):
                os.ftruncate(fd, 0)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            raise
        before, self._fd = self._fd, fd
        if before is not None:
            os.close(before)
        self._shard, self._size = shard, size

    def _read(self, shard: int, place: int) -> Entry | None:
        if shard not in self._files:
            if len(self._files) > 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
        data = os.pread(self._files[shard], 4096, place)
        if len(data) >= HEADER.size:
            length = min(HEADER.unpack_from(data)[1], LONGEST)
            if length + HEADER.size > len(data):
                data = os.pread(self._files[shard], length + HEADER.size, place)
        body = frame_at(data, 0)
        return unpack(body) if body is not None else None

    def _keep_synced(self) -> None:
        while not self._stop.wait(self.fsync_seconds):
            try:
                copy = os.dup(self._fd)  # the shard may be closed meanwhile
                os.fsync(copy)
                os.close(copy)
            except OSError:
                continue  # the end of the run tries again, and says so

    # Index.

    def _open_index(self) -> None:
        path = self.folder / "index.sqlite"
        for attempt in range(2):
            self._fresh.clear()
            self._fresh_spent.clear()
            try:
                self._index = sqlite3.connect(path, isolation_level=None)
                self._index.execute("PRAGMA journal_mode=WAL")
                self._index.execute("PRAGMA synchronous=NORMAL")
                self._index.executescript(_TABLES)
                self._catch_up()
                return
            except (sqlite3.DatabaseError, _OtherShardsError, UserError) as error:
                self._index.close()
                if attempt:
                    raise UserError(f"{path}: {error}") from error
                log.warning("%s is of no use (%s): made anew from the shards", path, error)
                for suffix in ("", "-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)

    def _catch_up(self) -> None:
        """Read into the index what was written after its last commit, and mend torn tails."""
        known = dict(self._index.execute("SELECT shard, size FROM shards"))
        there = dict(shards(self.folder))
        if any(n not in there or there[n].stat().st_size < size for n, size in known.items()):
            raise _OtherShardsError("it knows more than the shards hold")
        for number, path in there.items():
            start = known.get(number, 0)
            size = path.stat().st_size
            for begin, end, entry in scan(path, start):
                if entry is None:
                    self._quarantine(path, begin, end, tail=end == size)
                    size = begin if end == size else size
                else:
                    self._note(entry, number, begin)
                    if len(self._fresh) >= 10000:
                        self._commit(number, end)
            self._commit(number, size)

    def _quarantine(self, path: Path, begin: int, end: int, *, tail: bool) -> None:
        self.damaged += 1
        place = self.folder / "quarantine" / f"{path.stem}.{begin}.bin"
        place.parent.mkdir(exist_ok=True)
        with open(path, "rb") as file:
            file.seek(begin)
            place.write_bytes(file.read(end - begin))
        what = "torn tail cut off" if tail else "damaged, passed over"
        log.warning("%s: bytes %d to %d %s, kept in %s", path, begin, end, what, place)
        if tail:
            os.truncate(path, begin)

    @contextlib.contextmanager
    def _index_errors(self) -> Iterator[None]:
        """An index that fails stops the run: it is no fault of the triple that is asked about."""
        try:
            yield
        except sqlite3.Error as error:
            path = self.folder / "index.sqlite"
            raise UserError(
                f"{path}: {error}. No answer is lost: make room if the disk is full, else delete "
                "that file; then give the same command again"
            ) from error

    def _note(self, entry: Entry, shard: int, place: int) -> None:
        if entry.kind == "answer":
            self._fresh[bytes.fromhex(entry.key)] = (shard, place)
        for name in ("calls", "prompt_tokens", "completion_tokens"):
            amount = 1 if name == "calls" else getattr(entry, name)
            self._fresh_spent[entry.stage, entry.kind, name] += amount

    def _commit(self, shard: int | None = None, size: int | None = None) -> None:
        shard, size = (self._shard, self._size) if shard is None else (shard, size)
        self._committed = time.monotonic()
        with self._index_errors(), self._index:
            self._index.execute("BEGIN")
            rows = ((key, *where) for key, where in self._fresh.items())
            self._index.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
            self._index.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (shard, size))
            for (stage, kind, name), amount in self._fresh_spent.items():
                self._index.execute(
                    "INSERT OR IGNORE INTO spent VALUES (?, ?, 0, 0, 0)", (stage, kind)
                )
                self._index.execute(
                    f"UPDATE spent SET {name} = {name} + ? WHERE stage = ? AND kind = ?",
                    (amount, stage, kind),
                )
        self._fresh.clear()
        self._fresh_spent.clear()


class _OtherShardsError(Exception):
    """The index is not of these shards."""


def shards(folder: Path) -> list[tuple[int, Path]]:
    """The shards of a journal: (number, path), in order."""
    paths = sorted(Path(folder).glob("shard-*.co3j"))
    return [(int(path.stem.split("-")[1]), path) for path in paths]


def entries(folder: Path) -> Iterator[Entry]:
    """All whole entries of a journal, oldest first, without touching it."""
    for _, path in shards(folder):
        yield from (entry for _, _, entry in scan(path) if entry is not None)
