"""Ending a run whose validation no longer improves, and knowing its best checkpoint.

What is known of a run so far is read from the evaluations in its metrics.jsonl, not from a
checkpoint: a step's checkpoint is saved before the step is evaluated. That file tells one story
whatever was killed when, so a resumed run stops where an uninterrupted one would.
"""

import dataclasses
import json
import math
import re
from typing import NamedTuple

from etils import epath

from cosmo.engine.base import writer
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.writer import log
from cosmo.engine.checkpoints import run_checkpoints, saving
from cosmo.engine.train import metric_files

COUNT = "early_stopping/evaluations_since_best"  # marks the evaluations that count
SMALLER = r"(loss|perplexity|entropy)$"
LARGER = r"(accuracy|f1|bleu\W?4?)$"


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """Stop after `patience` evaluations without improvement (None: never stop early).

    `metric` is a name in metrics.jsonl. An evaluation improves on the best one so far if it is
    better by more than `min_delta`: smaller (`mode` "min") or larger ("max"); None tells by the
    name's end.
    """

    patience: int | None = None
    metric: str = "eval/all/perplexity"
    mode: str | None = None
    min_delta: float = 0.0

    def __post_init__(self):
        if self.patience is not None and not (isinstance(self.patience, int) and self.patience > 0):
            raise UserError(
                f"EARLY_STOPPING_PATIENCE={self.patience!r}; give a number of evaluations, at "
                "least 1, or None"
            )
        if not self.min_delta >= 0:
            raise UserError(f"EARLY_STOPPING_MIN_DELTA={self.min_delta!r}; give 0 or more")
        if self.mode not in ("min", "max", None):
            raise UserError(f"EARLY_STOPPING_MODE={self.mode!r}; it is 'min', 'max' or None")
        told = self.mode or re.search(f"{SMALLER}|{LARGER}", self.metric)
        if self.patience is not None and not told:
            raise UserError(
                f"EARLY_STOPPING_METRIC={self.metric!r}: whether smaller is better cannot be told "
                "by its name; give EARLY_STOPPING_MODE, 'min' or 'max'"
            )

    def gain(self, value: float, best: float) -> float:
        """By how much `value` is better than `best`."""
        smaller = self.mode == "min" or (self.mode is None and re.search(SMALLER, self.metric))
        return best - value if smaller else value - best

    def check(self, eval_period: int | None, save_period: int) -> None:
        """Raise UserError if a run cannot be stopped early with these periods, in steps."""
        if self.patience is None:
            return
        if eval_period is None:
            raise UserError(
                f"EARLY_STOPPING_PATIENCE={self.patience} needs evaluations: give EVAL_PERIOD"
            )
        if eval_period % save_period:
            raise UserError(
                f"CHECKPOINT_PERIOD={save_period} does not divide EVAL_PERIOD={eval_period}: with "
                "EARLY_STOPPING_PATIENCE every step that is evaluated must be saved"
            )


class Record(NamedTuple):
    """The best evaluation so far, and how many there were since."""

    best_step: int | None = None
    best: float = math.nan
    since: int = 0


def follow(config: StoppingConfig, record: Record, step: int, value: float | None) -> Record:
    """The record after an evaluation at `step`; a value that is not finite improves nothing."""
    finite = value is not None and math.isfinite(value)
    first = record.best_step is None
    if finite and (first or config.gain(value, record.best) > config.min_delta):
        return Record(step, value, 0)
    return record._replace(since=record.since + 1)


def read(config: StoppingConfig, model_dir: str, until_step: int) -> Record:
    """The record of a run by its metrics.jsonl, up to a step."""
    path = epath.Path(model_dir) / "metrics.jsonl"
    record = Record()
    for text in path.read_text().splitlines() if path.exists() else ():
        if metric_files.step_of(text) <= until_step and COUNT in text:
            line = json.loads(text)
            record = follow(config, record, line["step"], line.get(config.metric))
    return record


def ended(config: StoppingConfig, record: Record) -> bool:
    """Whether a run with this record is over."""
    return config.patience is not None and record.since >= config.patience


class Stopping:
    """Follows a run's evaluations; without a patience it does nothing.

    The step of the best one stands in MODEL_DIR/best, which `opening.locate` understands, and
    `saver` keeps its checkpoint. `start_step` is the step that the run goes on from, 0 if new; of
    several processes all decide alike and the first writes (`enabled`).
    """

    def __init__(
        self,
        config: StoppingConfig,
        model_dir: str,
        start_step: int,
        saver: saving.Saver,
        *,
        enabled: bool = True,
    ):
        self.config, self.saver, self.enabled = config, saver, enabled
        self.path = epath.Path(model_dir) / run_checkpoints.BEST
        self.record = Record()
        if config.patience is not None and start_step:
            self.record = read(config, model_dir, start_step)
            self._keep_best()

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return ended(self.config, self.record)

    def add(self, step: int, results: dict[str, float]) -> dict[str, float]:
        """Take note of an evaluation; the results to be written, with a count of ours.

        Raises UserError if the metric is not among them.
        """
        if self.config.patience is None:
            return results
        if self.config.metric not in results:
            raise UserError(
                f"EARLY_STOPPING_METRIC={self.config.metric!r} is not measured; the evaluation at "
                f"step {step} has {', '.join(sorted(results)) or 'no metrics'}"
            )
        self.record = follow(self.config, self.record, step, results[self.config.metric])
        if self.record.best_step == step:
            self.saver.wait()  # what `best` names is there
            self._keep_best()
        return {**results, COUNT: float(self.record.since)}

    def say(self, step: int) -> None:
        """Log how a run that is at `step` ended, or has ended before."""
        if self.config.patience is None:
            return
        best = f"best {self.record.best:.6g} at step {self.record.best_step}"
        if self.record.best_step is None:
            best = "it was never finite"
        if self.finished:
            log.info(
                "stopped early at step %d: %s has not improved for %d evaluations (%s); more "
                "EARLY_STOPPING_PATIENCE goes on",
                step,
                self.config.metric,
                self.record.since,
                best,
            )
        else:
            log.info("%s: %s", self.config.metric, best)
        if self.record.best_step is not None:
            log.info("the best checkpoint: CHECKPOINT_PATH=%s", self.path)

    def _keep_best(self) -> None:
        self.saver.best = self.record.best_step
        if not self.enabled:
            return
        if self.record.best_step is None:
            self.path.unlink(missing_ok=True)
        else:
            writer.write_atomic(self.path, f"{self.record.best_step}\n")
