"""Reduce the learning rate of a run whose evaluations no longer improve.

The rule is that of PyTorch's ReduceLROnPlateau and, for the warm-up, ParlAI's.
"""

import dataclasses
import json
import logging
import math
import struct
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from cosmo.engine.base.errors import UserError
from cosmo.engine.model.optimizer import LearningRateSchedule
from cosmo.engine.train import early_stopping, metric_files

log = logging.getLogger(__name__)

MIN_RATE_CHANGE = 1e-8  # PyTorch's eps: a reduction by no more than this is not made
# Metrics of an evaluation's line: the state after that evaluation.
BEST, BAD, SCALE = "plateau/best", "plateau/bad_evaluations", "plateau/rate_scale"


@dataclasses.dataclass(frozen=True)
class PlateauConfig:
    """Multiply the learning rate by `factor` after evaluations without improvement (None: never).

    `patience` such evaluations in a row are allowed; the next one reduces, and the count starts
    anew. `metric` is a name in metrics.jsonl. In `mode` "min" a value improves if it is below
    (1 - `threshold`) times the best so far, in "max" if it is above (1 + `threshold`) times it;
    None decides by the end of the metric's name. The rate, warm-up and other factors of the
    schedule left out, does not fall below `min_rate`. Evaluations of the warm-up do not count.
    """

    factor: float | None = None
    patience: int = 3
    metric: str = "eval/all/loss"
    mode: str | None = None
    threshold: float = 1e-4
    min_rate: float = 0.0

    def __post_init__(self):
        if self.factor is not None and not 0 < self.factor < 1:
            raise UserError(
                f"PLATEAU_FACTOR={self.factor!r}; give a number between 0 and 1, or None"
            )
        if not isinstance(self.patience, int) or self.patience < 0:
            raise UserError(
                f"PLATEAU_PATIENCE={self.patience!r}; give a number of evaluations, >= 0"
            )
        # This way around NaN is refused too.
        if not self.threshold >= 0:
            raise UserError(f"PLATEAU_THRESHOLD={self.threshold!r}; give 0 or more")
        if not self.min_rate >= 0:
            raise UserError(f"PLATEAU_MIN_RATE={self.min_rate!r}; give a learning rate, 0 or more")
        early_stopping.check_mode("PLATEAU", self.metric, self.mode, used=self.factor is not None)

    def check(self, eval_period: int | None) -> None:
        """Raise UserError if a run never evaluates, and so could not reduce its rate."""
        if self.factor is not None and eval_period is None:
            raise UserError(f"PLATEAU_FACTOR={self.factor} needs evaluations: give EVAL_PERIOD")

    def open(
        self,
        schedule: LearningRateSchedule,
        model_dir: str,
        start_step: int,
        saved: dict[str, Any] | None,
    ) -> "Plateau":
        """Return the plateau of a run; see `Plateau`."""
        return Plateau(self, schedule, model_dir, start_step, saved)

    def is_better(self, value: float, best: float) -> bool:
        """Return whether `value` improves on `best` by more than the threshold."""
        if early_stopping.smaller_is_better(self.metric, self.mode):
            return value < best * (1 - self.threshold)
        return value > best * (1 + self.threshold)


class PlateauState(NamedTuple):
    """The best value so far, evaluations since, and the factor of the schedule's rate."""

    best: float | None = None
    bad_evaluations: int = 0
    rate_scale: float = 1.0


def after_evaluation(
    config: PlateauConfig, state: PlateauState, value: float | None, base_rate: float
) -> PlateauState:
    """Return the state after an evaluation; `base_rate` is the rate before any reduction.

    A value of None (not measured), NaN or infinity is no improvement.
    """
    finite = value is not None and math.isfinite(value)
    if finite and (state.best is None or config.is_better(value, state.best)):
        return state._replace(best=value, bad_evaluations=0)
    bad = state.bad_evaluations + 1
    if bad <= config.patience:
        return state._replace(bad_evaluations=bad)
    old = base_rate * state.rate_scale
    new = max(old * config.factor, config.min_rate)
    # As in PyTorch, the count also starts anew at the lowest rate, which is not reduced.
    scale = new / base_rate if old - new > MIN_RATE_CHANGE else state.rate_scale
    return PlateauState(state.best, 0, scale)


def read_state(model_dir: str, step: int) -> PlateauState | None:
    """Return the state after the evaluation at `step` from metrics.jsonl; None if it has none."""
    for text in reversed(metric_files.read_lines(model_dir)):
        if SCALE in text and metric_files.step_of(text) == step:
            line = json.loads(text)
            return PlateauState(line[BEST], int(line[BAD]), line[SCALE])
    return None


class Plateau:
    """Follows a run's evaluations, and scales its learning rate.

    `start_step` is the step that the run resumes at, 0 if it is new; `saved` is the result of
    `progress` in the checkpoint of that step.
    """

    def __init__(
        self,
        config: PlateauConfig,
        schedule: LearningRateSchedule,
        model_dir: str,
        start_step: int,
        saved: dict[str, Any] | None,
    ):
        self.config, self.schedule = config, schedule
        self.state = PlateauState(**(saved or {}))
        if start_step:
            # A step is saved before it is evaluated: its evaluation's line has the newer state.
            self.state = _same_in_all_processes(read_state(model_dir, start_step), self.state)

    @property
    def value(self) -> np.float32:
        """The factor of the schedule's rate, an argument of the step."""
        return np.float32(self.state.rate_scale)

    def add(self, step: int, results: dict[str, float]) -> dict[str, float]:
        """Count an evaluation at `step`. Return the metrics to write: `results` and the state.

        Raises UserError if the metric is not among them.
        """
        early_stopping.check_measured("PLATEAU", self.config.metric, step, results)
        # As in ParlAI: while the rate rises, no evaluation shows that it is too high.
        if not self.schedule.warms_up(step):
            before, value = self.state, results[self.config.metric]
            base_rate = self.schedule.base_learning_rate
            self.state = after_evaluation(self.config, before, value, base_rate)
            if self.state.rate_scale != before.rate_scale:
                log.info(
                    "step %d: %s has not improved for %d evaluations (best %.6g): the learning "
                    "rate is now %.3g times the schedule's",
                    step,
                    self.config.metric,
                    before.bad_evaluations + 1,
                    math.nan if self.state.best is None else self.state.best,
                    self.state.rate_scale,
                )
        best = math.nan if self.state.best is None else self.state.best
        state = {BEST: best, BAD: float(self.state.bad_evaluations), SCALE: self.state.rate_scale}
        return {**results, **state}

    def progress(self) -> dict[str, Any]:
        """Return the state as JSON, for a checkpoint."""
        return self.state._asdict()


def _same_in_all_processes(found: PlateauState | None, saved: PlateauState) -> PlateauState:
    """Return `found` of the first process that has one, else `saved`.

    Every process must call this. A shared folder may show an older file to one of them, and other
    rates would train other parameters.
    """
    if jax.process_count() == 1:
        return found or saved
    best, bad, scale = found or saved
    # As bytes: JAX would round the numbers to float32.
    packed = struct.pack("<?ddd", found is not None, math.nan if best is None else best, bad, scale)
    rows = multihost_utils.process_allgather(np.frombuffer(packed, np.uint8))
    states = [struct.unpack("<?ddd", row.tobytes()) for row in np.asarray(rows)]
    _, best, bad, scale = next((state for state in states if state[0]), states[0])
    return PlateauState(None if math.isnan(best) else best, int(bad), scale)
