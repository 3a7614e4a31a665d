"""Write the metrics of a run: MODEL_DIR/metrics.jsonl, TensorBoard event files, a tracker."""

import importlib.util
import json
import logging
import math
import os
import time
from typing import Any, Protocol

from etils import epath

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.files import explained, is_remote

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"  # in MODEL_DIR
FLUSH_SECONDS = 120  # a TensorBoard that is open lags behind by so much
REMEDY = "free some space, and the same command continues"


class Lines:
    """A file of JSON lines, each with a "step", that a run appends to.

    A run that resumes at `start_step` drops the lines of later steps: its checkpoint does not hold
    those steps, and it does them again. At 0 it drops all lines.
    """

    def __init__(self, path: epath.PathLike, start_step: int = 0):
        self.path = epath.Path(path)
        # An object store cannot append: there each line writes the whole file, which stays small.
        self.remote = is_remote(path)
        self.lines: list[str] = []
        if self.path.exists():
            if start_step:
                there = self.path.read_text().splitlines()
                self.lines = [line for line in there if step_of(line) <= start_step]
            self._write_all()

    def add(self, line: str) -> None:
        """Append one line. Raises UserError if it cannot be written."""
        self.lines.append(line)
        # Elsewhere append, so that a failed write cannot damage older lines.
        if self.remote:
            self._write_all()
            return
        with explained(self.path, REMEDY):
            is_new = not self.path.exists()
            with self.path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                # A power loss must not take a line of a step before a checkpoint.
                os.fsync(file.fileno())
            if is_new:
                durable.sync(self.path.parent)

    def _write_all(self) -> None:
        write_atomic(self.path, "".join(line + "\n" for line in self.lines))


class Tracker(Protocol):
    """A service that gets the metrics too; `trackers.Tracker` is one."""

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step."""

    def close(self) -> None:
        """Wait until everything is sent."""


class MetricWriter:
    """Write metrics to MODEL_DIR/metrics.jsonl and, if installed, to TensorBoard event files.

    A run that resumes at `start_step` drops later steps (see `Lines`). Only one process of a run
    may be `enabled`; the others write nothing. A `tracker` gets the same metrics.
    """

    def __init__(
        self,
        model_dir: str,
        start_step: int = 0,
        *,
        enabled: bool = True,
        tracker: Tracker | None = None,
    ):
        self.tracker = tracker
        self.file = Lines(epath.Path(model_dir) / METRICS, start_step) if enabled else None
        self.board = _tensorboard(model_dir, start_step) if enabled else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line {"step": ..., name: value}. Raises UserError if that fails."""
        if self.file is not None:
            # JSON has no infinity and no NaN: null stands for both.
            clean = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
            self.file.add(json.dumps({"step": step, **clean}))
        if self.board is not None:
            self.board.add(step, metrics)
        if self.tracker is not None:
            self.tracker.add(step, metrics)

    def flush(self) -> None:
        """Write everything out. Call this before a checkpoint: a resumed run writes no old step."""
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Flush and close. Calling it twice does no harm."""
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None
        if self.board is not None:
            self.board.close()


def has_metric(model_dir: str, step: int, part: str) -> bool:
    """Return whether metrics.jsonl has a metric of `step` with `part` in its name."""
    lines = read_lines(model_dir)
    return any(step_of(x) == step and any(part in name for name in json.loads(x)) for x in lines)


def read_lines(model_dir: str) -> list[str]:
    """Return the lines of metrics.jsonl; none if there is no file."""
    path = epath.Path(model_dir) / METRICS
    return path.read_text().splitlines() if path.exists() else []


def step_of(line: str) -> float:
    """Return the "step" of a JSON line; infinity for a line that a kill has cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # later than every step, so that a resumed run drops the line


class _Board:
    """TensorBoard event files of one start, in `folder`; any failed write is a UserError.

    TensorBoard hides what earlier starts wrote from step `purge` on, if it is given.
    """

    # Not tensorboardX's SummaryWriter: its thread, and what it does at exit, print a traceback
    # each on a full disk, after the one line with which the run ends.
    def __init__(self, folder: str, purge: int | None):
        from tensorboardX import event_file_writer, record_writer, summary
        from tensorboardX.proto import event_pb2

        self.folder, self._scalar, self._event = folder, summary.scalar, event_pb2.Event
        record_writer.directory_check(folder)
        self._writer = event_file_writer.EventsWriter(f"{folder}/events")
        if purge is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(self._event(step=purge, file_version="brain.Event:2"))
            self._writer.write_event(self._event(step=purge, session_log=start))
        self._flushed = time.monotonic()
        self._open = True

    def add(self, step: int, metrics: dict[str, float]) -> None:
        with explained(self.folder, REMEDY):
            for name, value in metrics.items():
                summary = self._scalar(name, value)
                event = self._event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        with explained(self.folder, REMEDY):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        if self._open:
            self._open = False  # not again, if this fails
            with explained(self.folder, REMEDY):
                self._writer.close()


def _tensorboard(model_dir: str, start_step: int) -> Any:
    """Return a writer of TensorBoard event files, None if it cannot be had."""
    # tensorboardX, because it needs no TensorFlow: the training process never loads that.
    if importlib.util.find_spec("tensorboardX") is None:
        log.info("tensorboardX is not installed: metrics go to metrics.jsonl only")
        return None
    # purge_step makes TensorBoard hide the same lines that metrics.jsonl dropped.
    folder = epath.Path(model_dir) / "tensorboard"
    purge = (start_step + 1 if start_step else 0) if folder.exists() else None
    try:
        return _Board(str(folder), purge)
    except (ImportError, OSError) as error:  # a bucket needs its own client library
        log.warning("no TensorBoard files (%s): metrics go to metrics.jsonl only", error)
        return None
