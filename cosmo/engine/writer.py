"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a line that a person can follow."""

import json
import logging
import math
import os
import sys
import time
from typing import Any

from etils import epath

from cosmo.engine.errors import UserError

log = logging.getLogger("cosmo")


def prepare_folder(path: str, name: str = "MODEL_DIR") -> epath.Path:
    """Create a folder that can be written to, or raise UserError (before hours of work)."""
    folder = epath.Path(path)
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{name}={path} cannot be written to ({error.strerror or error}); "
            f"give another folder with --gin.{name}=PATH"
        ) from error
    return folder


def write_atomic(path: epath.PathLike, text: str) -> None:
    """Write a whole file or none: a reader never sees a half."""
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.partial"
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class MetricWriter:
    """Appends metrics to MODEL_DIR/metrics.jsonl and, if installed, to TensorBoard event files.

    On resumption at `start_step` the lines of later steps, from the part of the last run that its
    checkpoint does not hold, are dropped: the file always tells one story.
    """

    def __init__(self, model_dir: str, start_step: int = 0):
        self.path = epath.Path(model_dir) / "metrics.jsonl"
        if self.path.exists():
            kept = [
                line for line in self.path.read_text().splitlines() if _step(line) <= start_step
            ]
            write_atomic(self.path, "".join(line + "\n" for line in kept))
        try:
            self.file = self.path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.board = _tensorboard(model_dir, start_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line {"step": ..., name: value}; numbers that are not finite become null."""
        clean = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        try:
            self.file.write(json.dumps({"step": step, **clean}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash


def _tensorboard(model_dir: str, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        log.info("tensorboardX is not installed: metrics go to metrics.jsonl only")
        return None
    # purge_step makes TensorBoard hide the same lines that metrics.jsonl dropped.
    return SummaryWriter(
        str(epath.Path(model_dir) / "tensorboard"),
        purge_step=start_step + 1 if start_step else None,
    )


class Progress:
    """Rate and time left: rewritten in place on a terminal, a plain line now and then in a log."""

    def __init__(
        self, total: int, start: int = 0, *, unit: str = "step", every_seconds: float = 30
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
        left = (self.total - done) / rate if rate > 0 else math.inf
        text = (
            f"{self.unit} {done}/{self.total} {note} {rate:.2f} {self.unit}s/s, {_clock(left)} left"
        )
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
