"""End a run early whose evaluations no longer improve, and keep its best checkpoint."""

import dataclasses
import json
import logging
import math
import re
from typing import NamedTuple

from etils import epath

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import run_checkpoints
from cosmo.engine.checkpoints.checkpoint_writer import CheckpointWriter
from cosmo.engine.train import metric_files

log = logging.getLogger(__name__)

# Evaluations that count have this metric. The evaluation before training has not: its step has no
# checkpoint that could be the best.
COUNT = "early_stopping/evaluations_since_best"
# Ends of metrics' names: smaller is better, larger is better.
SMALLER_IS_BETTER = r"(loss|perplexity|entropy)$"
LARGER_IS_BETTER = r"(accuracy|f1|bleu\W?4?)$"


def check_mode(macros: str, metric: str, mode: str | None, *, used: bool) -> None:
    """Raise UserError unless `mode`, or the metric's name, shows what is better.

    `macros` begins the names of the settings, such as "EARLY_STOPPING". The name of a metric that
    is not `used` may show nothing.
    """
    if mode not in ("min", "max", None):
        raise UserError(f"{macros}_MODE={mode!r}; it is 'min', 'max' or None")
    known = mode or re.search(f"{SMALLER_IS_BETTER}|{LARGER_IS_BETTER}", metric)
    if used and not known:
        raise UserError(
            f"{macros}_METRIC={metric!r}: its name does not show whether smaller is better; give "
            f"{macros}_MODE, 'min' or 'max'"
        )


def smaller_is_better(metric: str, mode: str | None) -> bool:
    """Return whether smaller values of a metric are better: by `mode`, else by its name."""
    return mode == "min" or (mode is None and bool(re.search(SMALLER_IS_BETTER, metric)))


def check_measured(macros: str, metric: str, step: int, results: dict[str, float]) -> None:
    """Raise UserError unless the evaluation at `step` has the metric; `macros` as `check_mode`."""
    # At the first evaluation already, not after a patience of them.
    if metric not in results:
        raise UserError(
            f"{macros}_METRIC={metric!r} is not measured; the evaluation at step {step} has "
            f"{', '.join(sorted(results)) or 'no metrics'}"
        )


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """Stop after `patience` evaluations without improvement (None: never stop early).

    `metric` is a name in metrics.jsonl. An evaluation is an improvement if it is better than the
    best one so far by more than `min_delta`. In `mode` "min" smaller is better, in "max" larger;
    None decides by the end of the metric's name.
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
        if not self.min_delta >= 0:  # this way around NaN is refused too
            raise UserError(f"EARLY_STOPPING_MIN_DELTA={self.min_delta!r}; give 0 or more")
        used = self.patience is not None
        check_mode("EARLY_STOPPING", self.metric, self.mode, used=used)

    def gain(self, value: float, best: float) -> float:
        """Return by how much `value` is better than `best`; negative if it is worse."""
        return best - value if smaller_is_better(self.metric, self.mode) else value - best

    def check(self, eval_period: int | None, save_period: int) -> None:
        """Raise UserError if a run cannot be stopped early with these periods, in steps."""
        if self.patience is None:
            return
        if eval_period is None:
            raise UserError(
                f"EARLY_STOPPING_PATIENCE={self.patience} needs evaluations: give EVAL_PERIOD"
            )
        # The best evaluation must have a checkpoint.
        if eval_period % save_period:
            raise UserError(
                f"CHECKPOINT_PERIOD={save_period} does not divide EVAL_PERIOD={eval_period}: with "
                "EARLY_STOPPING_PATIENCE every step that is evaluated must be saved"
            )


class History(NamedTuple):
    """The best evaluation so far, and the number of evaluations since."""

    best_step: int | None = None
    best: float = math.nan
    since: int = 0


def after_evaluation(
    config: StoppingConfig, history: History, step: int, value: float | None
) -> History:
    """Return the history after an evaluation at `step`.

    A value of None (not measured), NaN or infinity is no improvement.
    """
    # A run that diverges has NaN: never the best, however NaN compares.
    finite = value is not None and math.isfinite(value)
    first = history.best_step is None
    if finite and (first or config.gain(value, history.best) > config.min_delta):
        return History(step, value, 0)
    return history._replace(since=history.since + 1)


def read_history(config: StoppingConfig, model_dir: str, until_step: int) -> History:
    """Return the history of a run up to a step, from the evaluations in its metrics.jsonl."""
    # Not from its checkpoint: a step is saved before it is evaluated. The file drops the lines of
    # steps that a resumed run repeats, so that run stops where an uninterrupted one would.
    history = History()
    for text in metric_files.read_lines(model_dir):
        # Evaluations are few among the lines of training: do not parse the others twice.
        if COUNT in text and metric_files.step_of(text) <= until_step:
            line = json.loads(text)
            history = after_evaluation(config, history, line["step"], line.get(config.metric))
    return history


def is_over(config: StoppingConfig, history: History) -> bool:
    """Return whether a run with this history must stop."""
    return config.patience is not None and history.since >= config.patience


class Stopping:
    """Follows a run's evaluations. Without a patience it does nothing.

    MODEL_DIR/best names the step of the best evaluation (see `run_checkpoints.locate`), and `saver`
    keeps its checkpoint. `start_step` is the step that the run resumes at, 0 if it is new. Only one
    process may be `enabled` to write.
    """

    # All processes measure the same metrics, so they decide alike without talking to each other.
    def __init__(
        self,
        config: StoppingConfig,
        model_dir: str,
        start_step: int,
        saver: CheckpointWriter,
        *,
        enabled: bool = True,
    ):
        self.config, self.saver, self.enabled = config, saver, enabled
        self.path = epath.Path(model_dir) / run_checkpoints.BEST
        self.history = History()
        if config.patience is not None and start_step:
            self.history = read_history(config, model_dir, start_step)
            # The last run may have been killed between its evaluation and this.
            self._keep_best()

    @property
    def finished(self) -> bool:
        """Whether the run is to stop."""
        return is_over(self.config, self.history)

    def add(self, step: int, results: dict[str, float]) -> dict[str, float]:
        """Count an evaluation at `step`. Return the metrics to write: `results` and COUNT.

        Raises UserError if the metric is not among them.
        """
        if self.config.patience is None:
            return results
        check_measured("EARLY_STOPPING", self.config.metric, step, results)
        value = results[self.config.metric]
        self.history = after_evaluation(self.config, self.history, step, value)
        if self.history.best_step == step:
            # The checkpoint that `best` will name must be complete first.
            self.saver.wait()
            self._keep_best()
        return {**results, COUNT: float(self.history.since)}

    def log_result(self, step: int) -> None:
        """Log whether a run that ends at `step` stopped early, and its best evaluation."""
        if self.config.patience is None:
            return
        best = f"best {self.history.best:.6g} at step {self.history.best_step}"
        if self.history.best_step is None:
            best = "it was never finite"
        if self.finished:
            log.info(
                "stopped early at step %d: %s has not improved for %d evaluations (%s); a larger "
                "EARLY_STOPPING_PATIENCE continues the run",
                step,
                self.config.metric,
                self.history.since,
                best,
            )
        else:
            log.info("%s: %s", self.config.metric, best)
        if self.history.best_step is not None:
            log.info("the best checkpoint: CHECKPOINT_PATH=%s", self.path)

    def _keep_best(self) -> None:
        """Write or remove MODEL_DIR/best, and have `saver` keep the best checkpoint."""
        self.saver.best = self.history.best_step
        if not self.enabled:
            return
        if self.history.best_step is None:
            self.path.unlink(missing_ok=True)
        else:
            write_atomic(self.path, f"{self.history.best_step}\n")
