"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a line that a person can follow."""

import contextlib
import logging
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator

from etils import epath

from cosmo.engine.base.errors import UserError

log = logging.getLogger("cosmo")


def prepare_folder(path: str, setting: str = "MODEL_DIR") -> epath.Path:
    """Create a folder and check that it can be written to; UserError, before hours of work."""
    folder = epath.Path(path)
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written to ({error.strerror or error}); give another folder",
            setting=setting,
        ) from error
    return folder


@contextlib.contextmanager
def only_writer(folder: epath.Path, setting: str = "MODEL_DIR") -> Iterator[None]:
    """Hold `folder` for this process; raise UserError if another holds it.

    The lock goes with the process, however it ends. An object store has none.
    """
    if is_remote(folder):
        yield
        return
    import fcntl

    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: stop it, or "
                "give another folder",
                setting=setting,
            ) from error
        except OSError:  # a file system without locks
            log.info("%s cannot be locked: see to it that nobody else writes there", folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_atomic(path: epath.PathLike, text: str) -> None:
    """Write a whole file or none: a reader never sees a half."""
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.partial"
    try:
        if is_remote(path):
            path.write_text(text)  # an object appears whole or not at all
        else:
            partial.write_text(text)
            partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` lies in an object store (gs://, s3://)."""
    return "://" in str(path)


class Progress:
    """Rate and time left: rewritten in place on a terminal, a plain line now and then in a log."""

    def __init__(
        self, total: int | None, start: int = 0, *, unit: str = "step", every_seconds: float = 30
    ):
        self.total, self.start, self.unit = total, start, unit
        self.began = self.printed = time.monotonic()
        self.every = every_seconds
        self.terminal = sys.stderr.isatty()
        self.dirty = False

    def update(self, done: int, note: str = "", *, force: bool = False) -> None:
        """Say that `done` of the total are finished; `note` is appended."""
        now = time.monotonic()
        if not force and now - self.printed < (0.2 if self.terminal else self.every):
            return
        self.printed = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        of, left = "", ""
        if self.total is not None:
            seconds = (self.total - done) / rate if rate > 0 else math.inf
            of, left = f"/{self.total}", f", {_clock(seconds)} left"
        text = f"{self.unit} {done}{of} {note} {rate:.2f} {self.unit}s/s{left}"
        if self.terminal:
            sys.stderr.write("\r\x1b[K" + text[:160])
            sys.stderr.flush()
            self.dirty = True
        else:
            log.info(text)

    def finish(self) -> None:
        """Leave the last line standing."""
        if self.dirty:
            sys.stderr.write("\n")
            self.dirty = False


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
