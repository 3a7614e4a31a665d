"""Watch for bad steps: a loss or gradient norm that is not finite, or a spike of the norm.

The policy "stop" ends the run before the bad update reaches a checkpoint. The policy "skip" leaves
parameters and optimizer state as they were; the step counter, and so data and randomness, advances.
Either way the batch is recorded in MODEL_DIR/bad_steps.jsonl.
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

from cosmo.engine.base import durable
from cosmo.engine.base.atomic import replacing
from cosmo.engine.base.errors import UserError
from cosmo.engine.model import losses
from cosmo.engine.model.step import check_bad_step_policy
from cosmo.engine.train import metric_files

log = logging.getLogger(__name__)

# A step is judged this many steps late, so that the device always has work queued. Its limit is a
# function of steps further back: of the run alone, not of when a report made the host wait.
LAG = 8
MIN_MEDIAN_STEPS = 10  # a median of fewer good steps is too noisy to call a spike
RECORD = "bad_steps.jsonl"
BATCHES = "bad_steps"  # folder of the tokens of batches whose rows have no names

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
        if self.window < MIN_MEDIAN_STEPS:
            raise UserError(
                f"bad_steps.BadStepConfig.window={self.window}; it must be >= {MIN_MEDIAN_STEPS}"
            )

    @property
    def skips(self) -> bool:
        """Whether the step function takes a limit, and leaves the state as it is beyond it."""
        return self.policy == "skip"


class _InFlight(NamedTuple):
    step: int
    sums: Sums  # on the device still
    batch: Any  # datasets.TrainBatch
    limit: np.float32


class BadStepMonitor:
    """Judges each step of a run, and adds up the sums of the good ones for a report.

    `saved` is the result of `progress` at the checkpoint of `start_step` that the run resumes from.
    `kept()` describes the newest saved step, for an error's text. Only one process is `enabled` to
    write files.
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
        # LAG more than the median needs: the newest are too young for the limit of the next step.
        self.norms = collections.deque(map(tuple, saved.get("norms", [])), config.window + LAG)
        self.in_a_row = saved.get("in_a_row", 0)
        self.bad_steps = saved.get("bad_steps", 0)  # of the run so far
        # Sums of good steps since the last report: float32 as from the device, so totals are equal.
        self.unreported: list[Sums] = [
            {name: np.float32(value) for name, value in sums.items()}
            for sums in saved.get("window", [])
        ]
        self.in_flight: collections.deque[_InFlight] = collections.deque()
        self.record = metric_files.Lines(self.folder / RECORD, start_step) if enabled else None

    def limit(self, step: int) -> np.float32:
        """Return the gradient norm above which `step` is bad; infinity without a spike factor."""
        if self.config.spike_factor is None:
            return np.float32(np.inf)
        known = [norm for number, norm in self.norms if number < step - LAG]
        known = known[-self.config.window :]
        if len(known) < MIN_MEDIAN_STEPS:
            return np.float32(np.inf)
        return np.float32(self.config.spike_factor * float(np.median(known)))

    def add(self, step: int, sums: Sums, batch: Any, limit: np.float32) -> None:
        """Queue a step that was begun, and judge the one LAG steps before it.

        Raises UserError if that one was bad and the policy is "stop", or if too many were bad.
        """
        # The copies overlap with the steps that follow; judging then does not wait.
        for value in sums.values():
            value.copy_to_host_async()
        self.in_flight.append(_InFlight(step, sums, batch, limit))
        if len(self.in_flight) > LAG:
            self._judge_oldest()

    def judge_all(self) -> None:
        """Judge all steps so far. Raises UserError as `add` does."""
        while self.in_flight:
            self._judge_oldest()

    def report(self) -> dict[str, float]:
        """Return metrics over the good steps since the last report, then start anew.

        loss is in nats a token. A run that skips also has `bad_steps`, counted from its beginning.
        """
        self.judge_all()
        count = {"bad_steps": float(self.bad_steps)} if self.config.skips else {}
        if not self.unreported:
            return count
        totals, newest = losses.total_sums(self.unreported), self.unreported[-1]
        self.unreported = []
        return {
            **losses.per_token(totals),
            "z_loss": totals["z_loss"] / max(totals["num_tokens"], 1.0),
            "grad_norm": float(newest["grad_norm"]),
            "learning_rate": float(newest["learning_rate"]),
            **count,
        }

    def progress(self) -> dict[str, Any]:
        """Return this monitor's state as JSON, for a checkpoint."""
        # Before a save: no checkpoint may hold a bad step.
        self.judge_all()
        # JSON keeps a float32 exactly, because Python writes the shortest text of its float64.
        return {
            "norms": [[step, float(norm)] for step, norm in self.norms],
            "in_a_row": self.in_a_row,
            "bad_steps": self.bad_steps,
            "window": [{name: float(v) for name, v in sums.items()} for sums in self.unreported],
        }

    def _judge_oldest(self) -> None:
        step, sums, batch, limit = self.in_flight.popleft()
        sums = {name: np.asarray(value) for name, value in sums.items()}
        loss, norm = float(sums["loss"]), sums["grad_norm"]
        # The same comparison as in `make_train_step`, in float32: host and device must agree.
        if math.isfinite(loss) and np.isfinite(norm) and norm <= limit:
            self.unreported.append(sums)
            self.in_a_row = 0
            if self.config.spike_factor is not None:
                self.norms.append((step, float(norm)))
            return
        self.bad_steps += 1
        self.in_a_row += 1
        where = self._record_batch(step, loss, float(norm), float(limit), batch)
        what = f"step {step} is bad: loss {loss:.6g}, gradient norm {float(norm):.6g}"
        what += f" (limit {float(limit):.6g})" if np.isfinite(limit) else ""
        advice = (
            "Try a lower learning rate (BASE_LEARNING_RATE), MAX_GRAD_NORM, another RANDOM_SEED"
        )
        if not self.config.skips:
            raise UserError(
                f"{what}; its batch is in {where}, and {self.kept()}. {advice}, or "
                "BAD_STEP_POLICY=skip"
            )
        if self.in_a_row > self.config.max_in_a_row:
            raise UserError(
                f"{what}, and so were the {self.in_a_row - 1} before it (MAX_BAD_STEPS="
                f"{self.config.max_in_a_row}); their batches are in {self.folder / RECORD}, and "
                f"{self.kept()}. {advice}"
            )
        log.warning("%s; skipped, its batch is in %s", what, where)

    def _record_batch(self, step: int, loss: float, norm: float, limit: float, batch: Any) -> str:
        """Write the step's line to bad_steps.jsonl, and return the file that names its batch."""
        if not self.enabled:
            return str(self.folder / RECORD)
        line = {"step": step, "loss": _json_number(loss), "grad_norm": _json_number(norm)}
        line["limit"] = limit if math.isfinite(limit) else None
        if batch.rows is not None:
            line["rows"] = np.asarray(batch.rows).tolist()
        else:
            # Rows that come from SeqIO, not from a cache, have no numbers: the tokens are kept.
            line["tokens"] = f"{BATCHES}/{step}.npz"
            with replacing(self.folder / line["tokens"]) as partial:
                durable.make_folder(partial.parent)
                with partial.open("wb") as file:
                    np.savez_compressed(file, **batch.arrays)
        # The tokens are in place first, so that a line never names a missing file.
        self.record.add(json.dumps(line))
        return str(self.folder / line.get("tokens", RECORD))


def _json_number(value: float) -> float | str:
    """Return a finite value as it is, others as the text "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else str(value)  # JSON has no number that is not finite
