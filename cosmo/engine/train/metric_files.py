"""The numbers of a run: MODEL_DIR/metrics.jsonl and TensorBoard event files."""

import json
import math
from typing import Any

from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.writer import is_remote, log, write_atomic


class Lines:
    """A file of JSON lines with a "step" each, appended to while a run goes on.

    On resumption at `start_step` the lines of later steps, from the part of the last run that its
    checkpoint does not hold, are dropped: the file always tells one story. At 0 that is all.
    """

    def __init__(self, path: epath.PathLike, start_step: int = 0):
        self.path = epath.Path(path)
        # An object store cannot append: there the file, which stays small, is written anew.
        self.remote = is_remote(path)
        self.lines: list[str] = []
        if self.path.exists():
            if start_step:
                there = self.path.read_text().splitlines()
                self.lines = [line for line in there if step_of(line) <= start_step]
            write_atomic(self.path, "".join(line + "\n" for line in self.lines))

    def add(self, line: str) -> None:
        """Append one line. Raises UserError if it cannot be written."""
        self.lines.append(line)
        if self.remote:
            write_atomic(self.path, "".join(line + "\n" for line in self.lines))
            return
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error


class MetricWriter:
    """Writes metrics to MODEL_DIR/metrics.jsonl and, if installed, to TensorBoard event files.

    On resumption at `start_step` later steps are dropped (see `Lines`). Of several processes only
    the first writes (`enabled`).
    """

    def __init__(self, model_dir: str, start_step: int = 0, *, enabled: bool = True):
        self.enabled = enabled
        if enabled:
            self.file = Lines(epath.Path(model_dir) / "metrics.jsonl", start_step)
            self.board = _tensorboard(model_dir, start_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line {"step": ..., name: value}; numbers that are not finite become null."""
        if not self.enabled:
            return
        clean = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self.file.add(json.dumps({"step": step, **clean}))
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Leave nothing in this process's memory: what a checkpoint follows must not be lost."""
        if self.enabled and self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        if self.enabled and self.board is not None:
            self.board.close()


def has(model_dir: str, step: int, part: str) -> bool:
    """Whether metrics.jsonl has a line of `step` with a metric with `part` in its name."""
    path = epath.Path(model_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(step_of(x) == step and any(part in name for name in json.loads(x)) for x in lines)


def step_of(line: str) -> float:
    """The "step" of a JSON line; infinite if it was cut short."""
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
    folder = epath.Path(model_dir) / "tensorboard"
    purge = (start_step + 1 if start_step else 0) if folder.exists() else None
    try:
        return SummaryWriter(str(folder), purge_step=purge)
    except (ImportError, OSError) as error:  # a bucket needs its own client library
        log.warning("no TensorBoard files (%s): metrics go to metrics.jsonl only", error)
        return None
