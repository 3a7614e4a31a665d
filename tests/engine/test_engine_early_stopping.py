"""Early stopping: when a run ends, which checkpoint is its best; and a kill changes nothing."""

import json
import logging
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, run_checkpoints
from cosmo.engine.train import early_stopping, evaluate, train
from cosmo.engine.train.early_stopping import History, StoppingConfig

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from tests.engine import fault_driver, faults

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "config, values, best_step, counts",
    [
        ({}, [9, 7, 8, 7, 6, 6.5], 5, [0, 0, 1, 2, 0, 1]),
        ({"mode": "max"}, [9, 7, 8, 7, 10, 10], 5, [0, 1, 2, 3, 0, 1]),
        ({"metric": "infer_eval/soda/bleu4"}, [0.1, 0.3, 0.2], 2, [0, 0, 1]),
        ({"min_delta": 0.5}, [9, 8.6, 8.5, 8.4, 7.9], 4, [0, 1, 2, 0, 1]),
        ({}, [NAN, INF, 5, NAN, None, 4], 6, [1, 2, 0, 1, 2, 0]),
        ({}, [NAN, NAN], None, [1, 2]),
    ],
)
def test_evaluations_since_the_best(config, values, best_step, counts):
    """Oracle: by hand; with min_delta, 8.4 is the first to beat 9, and 7.9 does not beat it."""
    config = StoppingConfig(patience=3, **config)
    history, found = History(), []
    for step, value in enumerate(values, 1):
        history = early_stopping.after_evaluation(config, history, step, value)
        found.append(history.since)
    assert (history.best_step, found) == (best_step, counts)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"patience": 0}, "EARLY_STOPPING_PATIENCE=0"),
        ({"patience": 2, "mode": "low"}, "EARLY_STOPPING_MODE='low'"),
        ({"patience": 2, "min_delta": -1.0}, "EARLY_STOPPING_MIN_DELTA=-1.0"),
        ({"patience": 2, "metric": "eval/all/z"}, "its name does not show"),
    ],
)
def test_settings_that_cannot_be(fields, words):
    """Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError, match=words):
        StoppingConfig(**fields)


@pytest.mark.parametrize(
    "periods, words",
    [
        ((None, 10), "needs evaluations: give EVAL_PERIOD"),
        ((10, 4), "CHECKPOINT_PERIOD=4 does not"),
    ],
)
def test_periods_that_cannot_be(periods, words):
    """Oracle: DESIGN, habit 3; without a patience every period goes."""
    StoppingConfig().check(*periods)
    StoppingConfig(2).check(10, 5)
    with pytest.raises(UserError, match=words):
        StoppingConfig(2).check(*periods)


# Evaluations at steps 4, 8, ...; the best is at 8, and 12, 16 and 20 are no better: 20 is the end.
VALUES = {"4": 9.0, "8": 5.0, "12": 6.0, "16": 5.5, "20": 5.0, "24": 1.0, "28": 1.0, "30": 1.0}
RUN = {"eval_period": 4, "save_period": 4, "keep": 1, "patience": 3, "perplexity": VALUES}


def run(folder, *, until=None, **changes):
    """A training run in this process, cut after the evaluation of step `until`; its last state."""
    options = {**fault_driver.OPTIONS, **RUN, **changes}
    with pytest.MonkeyPatch.context() as patch:
        fault_driver.patch(options, patch.setattr)
        if until is not None:
            run_evaluator = evaluate.Evaluator.run

            def cut(evaluator, params, step):
                if step > until:
                    raise KeyboardInterrupt
                return run_evaluator(evaluator, params, step)

            patch.setattr(evaluate.Evaluator, "run", cut)
        return train.train(**fault_driver.settings(str(folder), options))


def test_a_run_stops_and_is_over(tmp_path, caplog):
    """Three evaluations without improvement. Oracle: by hand, of VALUES.

    Cut in the middle of an evaluation and resumed, it leaves the same state, metrics and best
    checkpoint, to the bit: one that was not cut is the oracle.
    """
    caplog.set_level(logging.INFO, "cosmo")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    state = run(whole)
    assert int(state.step) == 20
    assert (
        "stopped early at step 20: eval/all/perplexity has not improved for 3 evaluations "
        "(best 5 at step 8)" in caplog.text
    )
    assert run_checkpoints.completed_steps(str(whole)) == [
        8,
        20,
    ]  # KEEP_CHECKPOINTS=1, and the best
    assert any_format.locate(f"{whole}/best") == (str(whole), 8, "cosmo")
    counts = [m[early_stopping.COUNT] for m in faults.metrics(whole) if "eval/task/sum" in m]
    assert counts == [0, 0, 1, 2, 3]

    with pytest.raises(KeyboardInterrupt):
        run(cut, until=12)  # step 16 is saved, and not evaluated
    assert run_checkpoints.completed_steps(str(cut)) == [8, 16]
    resumed = run(cut)
    for leaf, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    (arrays, told), (expected_arrays, expected) = faults.results(cut), faults.results(whole)
    assert (arrays, told) == (expected_arrays, expected)
    assert (cut / "best").read_text() == (whole / "best").read_text() == "8\n"

    # Started again it is over, whatever is left to train; with more patience it goes on.
    caplog.clear()
    before = faults.results(whole)
    again = run(whole, total_steps=1000)
    assert "stopped early at step 20" in caplog.text and faults.results(whole) == before
    np.testing.assert_array_equal(
        again.params["token_embedder"], state.params["token_embedder"], strict=True
    )
    assert int(run(whole, patience=4).step) == 30
    assert any_format.locate(f"{whole}/best").step == 24


def test_a_run_that_is_not_stopped_says_its_best(tmp_path, caplog):
    """Oracle: by hand: the best of VALUES, to step 12, at step 8."""
    caplog.set_level(logging.INFO, "cosmo")
    assert int(run(tmp_path, total_steps=12).step) == 12
    assert "eval/all/perplexity: best 5 at step 8" in caplog.text
    (tmp_path / "best").write_text("7\n")
    with pytest.raises(UserError, match=r"best names .*/7, which is not there any more"):
        any_format.locate(str(tmp_path / "best"))


def test_a_metric_that_is_not_measured(tmp_path):
    """Oracle: DESIGN, habit 3: the error names those there are; the step is kept."""
    with pytest.raises(
        UserError, match=r"'eval/all/perplexity' is not .* step 4 has eval/task/sum"
    ):
        run(tmp_path, perplexity={})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    assert run_checkpoints.completed_steps(str(tmp_path)) == [4]
