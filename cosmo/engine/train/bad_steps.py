"""What happens when a step goes bad: a loss or gradient that is not finite, or a spike.

The policy is "stop" (the run ends before the bad update reaches a checkpoint) or "skip" (the step
leaves parameters and optimizer state as they were; the step counter, and with it data and
randomness, goes on). Either way the batch is written down.

A step is judged LAG steps late, so that the device always has work queued. The limit that a step's
gradient is held to is a function of the steps more than LAG before it, and so of the run alone: not
of when a report or a save made the host wait.
"""

import collections
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import losses
from cosmo.engine.model.step import check_bad_step_policy
from cosmo.engine.train import metric_files

log = logging.getLogger(__name__)

LAG = 8  # steps
ENOUGH = 10  # good steps that a median is taken of at least
RECORD = "bad_steps.jsonl"
BATCHES = "bad_steps"  # the folder of their tokens

Sums = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BadStepConfig:
    """`policy` "stop" or "skip"; a step is bad if its loss or gradient norm is not finite.

    With `spike_factor`, also if its gradient norm exceeds that many times the median of the last
    `window` good steps. More than `max_in_a_row` bad steps in a row end a run that skips.
    """

    policy: str = "stop"
    spike_factor: float | None = None
    max_in_a_row: int = 10
    window: int = 100

    def __post_init__(self):
        check_bad_step_policy(self.policy)
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise UserError(f"SPIKE_FACTOR={self.spike_factor!r}; give a number above 1, or None")
        if self.max_in_a_row < 1:
            raise UserError(f"MAX_BAD_STEPS={self.max_in_a_row!r}; it must be at least 1")
        if self.window < ENOUGH:
            raise UserError(f"bad_steps.BadStepConfig.window={self.window}; it must be >= {ENOUGH}")

    @property
    def skips(self) -> bool:
        """Whether the step function takes a limit, and leaves the state as it is beyond it."""
        return self.policy == "skip"


class _InFlight(NamedTuple):
    step: int
    sums: Sums  # on the device still
    batch: Any  # data.TrainBatch
    limit: np.float32


class BadStepMonitor:
    """Follows a run's steps: judges each, and adds up the sums of the good ones for a report.

    `saved` is what `progress` gave at the checkpoint that the run goes on from, at `start_step`;
    `kept` says which step that would be now, for an error's text.
    """

    def __init__(
        self,
        config: BadStepConfig,
        model_dir: str,
        start_step: int = 0,
        saved: dict[str, Any] | None = None,
        *,
        kept: Callable[[], str] = lambda: "",
        enabled: bool = True,
    ):
        self.config, self.kept, self.enabled = config, kept, enabled
        self.folder = epath.Path(model_dir)
        saved = saved or {}
        self.norms = collections.deque(map(tuple, saved.get("norms", [])), config.window + LAG)
        self.in_a_row = saved.get("in_a_row", 0)
        self.bad_steps = saved.get("bad_steps", 0)  # of the run so far
        self.window: list[Sums] = [
            {name: np.float32(value) for name, value in sums.items()}
            for sums in saved.get("window", [])
        ]
        self.in_flight: collections.deque[_InFlight] = collections.deque()
        self.record = metric_files.Lines(self.folder / RECORD, start_step) if enabled else None

    def limit(self, step: int) -> np.float32:
        """The gradient norm above which `step` is bad; infinite without spikes to look for."""
        if self.config.spike_factor is None:
            return np.float32(np.inf)
        known = [norm for number, norm in self.norms if number < step - LAG]
        known = known[-self.config.window :]
        if len(known) < ENOUGH:
            return np.float32(np.inf)
        return np.float32(self.config.spike_factor * float(np.median(known)))

    def add(self, step: int, sums: Sums, batch: Any, limit: np.float32) -> None:
        """Take note of a step that was begun, and judge the one LAG before it.

        Raises UserError if that was bad and the policy is "stop", or if too many were bad.
        """
        for value in sums.values():
            value.copy_to_host_async()
        self.in_flight.append(_InFlight(step, sums, batch, limit))
        if len(self.in_flight) > LAG:
            self._judge()

    def settle(self) -> None:
        """Judge all steps so far: before a save, which must not hold a bad one."""
        while self.in_flight:
            self._judge()

    def report(self) -> dict[str, float]:
        """Numbers of the good steps since the last report, which are then forgotten.

        A run that skips also has `bad_steps`, a count since its beginning.
        """
        self.settle()
        count = {"bad_steps": float(self.bad_steps)} if self.config.skips else {}
        if not self.window:
            return count
        totals, newest = losses.total_sums(self.window), self.window[-1]
        self.window = []
        return {
            **losses.per_token(totals),
            "z_loss": totals["z_loss"] / max(totals["num_tokens"], 1.0),
            "grad_norm": float(newest["grad_norm"]),
            "learning_rate": float(newest["learning_rate"]),
            **count,
        }

    def progress(self) -> dict[str, Any]:
        """What a checkpoint must remember, as JSON; every step has been judged then.

        float32 numbers come back from JSON as they were.
        """
        self.settle()
        return {
            "norms": [[step, float(norm)] for step, norm in self.norms],
            "in_a_row": self.in_a_row,
            "bad_steps": self.bad_steps,
            "window": [{name: float(v) for name, v in sums.items()} for sums in self.window],
        }

    def _judge(self) -> None:
        step, sums, batch, limit = self.in_flight.popleft()
        sums = {name: np.asarray(value) for name, value in sums.items()}
        loss, norm = float(sums["loss"]), sums["grad_norm"]
        if math.isfinite(loss) and np.isfinite(norm) and norm <= limit:
            self.window.append(sums)
            self.in_a_row = 0
            if self.config.spike_factor is not None:
                self.norms.append((step, float(norm)))
            return
        self.bad_steps += 1
        self.in_a_row += 1
        where = self._write_down(step, loss, float(norm), float(limit), batch)
        what = f"step {step} is bad: loss {loss:.6g}, gradient norm {float(norm):.6g}"
        what += f" (limit {float(limit):.6g})" if np.isfinite(limit) else ""
        advice = (
            "Try a lower learning rate (BASE_LEARNING_RATE), MAX_GRAD_NORM, another RANDOM_SEED"
        )
        if not self.config.skips:
            raise UserError(
                f"{what}; its batch is in {where}, and {self.kept()}. {advice}, or "
                "--gin.BAD_STEP_POLICY=skip"
            )
        if self.in_a_row > self.config.max_in_a_row:
            raise UserError(
                f"{what}, and so were the {self.in_a_row - 1} before it (MAX_BAD_STEPS="
                f"{self.config.max_in_a_row}); their batches are in {self.folder / RECORD}, and "
                f"{self.kept()}. {advice}"
            )
        log.warning("%s; skipped, its batch is in %s", what, where)

    def _write_down(self, step: int, loss: float, norm: float, limit: float, batch: Any) -> str:
        """The step's line in bad_steps.jsonl and, of rows without names, their tokens."""
        if not self.enabled:
            return str(self.folder / RECORD)
        line = {"step": step, "loss": _number(loss), "grad_norm": _number(norm)}
        line["limit"] = limit if math.isfinite(limit) else None
        if batch.rows is not None:
            line["rows"] = np.asarray(batch.rows).tolist()
        else:
            line["tokens"] = f"{BATCHES}/{step}.npz"
            _save_arrays(self.folder / line["tokens"], batch.arrays)
        self.record.add(json.dumps(line))
        return str(self.folder / line.get("tokens", RECORD))


def _save_arrays(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite: "nan" and "inf" here."""
    return value if math.isfinite(value) else str(value)
