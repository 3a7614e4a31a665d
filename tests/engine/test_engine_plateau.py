"""Reduce on plateau: PyTorch's rates, and a kill changes nothing."""

import functools
import json
import logging
import math

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from cosmo.engine.base import progress, silence
from cosmo.engine.base.errors import UserError
from cosmo.engine.model.optimizer import LearningRateSchedule
from cosmo.engine.train import evaluate, metric_files, reduce_on_plateau, train
from cosmo.engine.train.reduce_on_plateau import PlateauConfig, PlateauState
from tests.engine import faults

NAN, INF = math.nan, math.inf
MAX = {"mode": "max"}
# torch.optim.lr_scheduler.ReduceLROnPlateau (PyTorch 2.13), recorded: its rate after every
# evaluation as (rate, how often in a row), its best value, and its count of bad evaluations.
# The threshold is 1e-4 of the best: 3.9997 is no better than 4, and 3.9995 is.
TORCH = {
    "min": (
        dict(factor=0.5, patience=3),
        1e-5,
        [5, 4, 4, 3.9997, 3.9995, 4, 4, 4, 3, NAN, 3, INF, 3, 3, 3, 3, 2],
        [(1e-5, 12), (5e-6, 5)],
        (2.0, 0),
    ),
    "max": (
        dict(factor=0.5, patience=1, **MAX),
        1e-5,
        [0.1, 0.2, 0.20001, 0.2001, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1],
        [(1e-5, 5), (5e-6, 3), (2.5e-6, 2), (1.25e-6, 1)],
        (0.3, 0),
    ),
    "lowest rate": (
        dict(factor=0.1, patience=0, min_rate=2e-7),
        1e-3,
        [1.0] + [2.0] * 8,
        [(1e-3, 1), (1e-4, 1), (1e-5, 1), (1e-6, 1), (2e-7, 5)],
        (1.0, 0),
    ),
    "least change": (
        dict(factor=0.5, patience=0),
        1e-5,
        [1.0] + [2.0] * 13,
        [(1e-5 / 2**k, 1) for k in range(9)] + [(1.953125e-8, 5)],
        (1.0, 0),
    ),
    "negative": (
        dict(factor=0.5, patience=1),
        1e-5,
        [-1.0, -1.00005, -0.99995, -1.5, -1.5],
        [(1e-5, 5)],
        (-1.5, 0),
    ),
    "threshold": (
        dict(factor=0.5, patience=1, threshold=0.1),
        1e-5,
        [2.0, 1.9, 1.9, 1.9],
        [(1e-5, 2), (5e-6, 2)],
        (2.0, 1),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_rates_are_those_of_pytorch(name):
    """Oracle: PyTorch's scheduler on the same values, recorded."""
    fields, base, values, runs, (best, bad) = TORCH[name]
    state, rates = PlateauState(), []
    for value in values:
        state = reduce_on_plateau.after_evaluation(PlateauConfig(**fields), state, value, base)
        rates.append(base * state.rate_scale)
    expected = [rate for rate, count in runs for _ in range(count)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert (state.best, state.bad_evaluations) == (best, bad)


def test_evaluations_of_the_warm_up_do_not_count(tmp_path):
    """Oracle: ParlAI's scheduler, recorded: 5 steps of warm-up, patience 1, an equal loss each 2.

    Its rate halves after the updates 10 and 14 and 18: those at 2 and 4 count for nothing.
    """
    schedule = LearningRateSchedule("constant * linear_warmup", 1e-5, warmup_steps=5)
    config = PlateauConfig(factor=0.5, patience=1)
    plateau = reduce_on_plateau.Plateau(config, schedule, str(tmp_path), 0, None)
    scales = {}
    for step in range(2, 20, 2):
        plateau.add(step, {"eval/all/loss": 3.0})
        scales[step] = float(plateau.value)
    assert scales == {
        **dict.fromkeys((2, 4, 6, 8), 1.0),
        **{10: 0.5, 12: 0.5, 14: 0.25, 16: 0.25, 18: 0.125},
    }


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"factor": 1.0}, "PLATEAU_FACTOR=1.0"),
        ({"factor": 0.5, "patience": -1}, "PLATEAU_PATIENCE=-1"),
        ({"factor": 0.5, "mode": "low"}, "PLATEAU_MODE='low'"),
        ({"factor": 0.5, "threshold": NAN}, "PLATEAU_THRESHOLD=nan"),
        ({"factor": 0.5, "min_rate": -1.0}, "PLATEAU_MIN_RATE=-1.0"),
        ({"factor": 0.5, "metric": "eval/all/z"}, "PLATEAU_METRIC='eval/all/z': its name does"),
    ],
)
def test_settings_that_cannot_be(fields, words):
    """Oracle: DESIGN, habit 3."""
    with pytest.raises(UserError, match=words):
        PlateauConfig(**fields)


def test_a_run_that_never_evaluates():
    """Oracle: DESIGN, habit 3; without a factor every run goes."""
    PlateauConfig().check(None)
    PlateauConfig(0.5).check(10)
    with pytest.raises(UserError, match=r"PLATEAU_FACTOR=0\.5 needs evaluations"):
        PlateauConfig(0.5).check(None)


# Evaluations at 4, 8, ...; the warm-up lasts 20 steps. 20 is the first that counts, and the best;
# 24, 28 and 30 are no better: with a patience of 0 each of them halves the rate.
VALUES = {"4": 9.0, "8": 1.0, "12": 9.0, "16": 9.0, "20": 5.0, "24": 6.0, "28": 5.0, "30": 7.0}
RUN = {
    "eval_period": 4,
    "stats_period": 1,
    "keep": None,
    "perplexity": VALUES,
    "plateau": {"factor": 0.5, "patience": 0, "metric": "eval/all/perplexity"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(save_period)`: (options, MODEL_DIR) of a run that was not cut."""

    @functools.cache
    def make(save_period):
        options = {**RUN, "save_period": save_period}
        folder = tmp_path_factory.mktemp("whole")
        faults.run_here(options, folder)
        return options, folder

    return make


def rates(folder) -> dict[int, float]:
    """The learning rate of every step, from metrics.jsonl."""
    lines = faults.metrics(folder)
    return {m["step"]: m["train/learning_rate"] for m in lines if "train/learning_rate" in m}


def test_the_rate_of_a_run(whole):
    """Oracle: by hand: 0.01 from step 21 on, halved from 25 and again from 29 on."""
    _, folder = whole(4)
    found = rates(folder)
    assert found[20] == pytest.approx(0.01 * 19 / 20)
    halves = dict.fromkeys(range(21, 25), 1.0) | dict.fromkeys(range(25, 29), 0.5)
    for step, scale in (halves | {29: 0.25, 30: 0.25}).items():
        assert found[step] == pytest.approx(0.01 * scale), step
    lines = [m for m in faults.metrics(folder) if reduce_on_plateau.SCALE in m]
    assert [m[reduce_on_plateau.SCALE] for m in lines] == [1, 1, 1, 1, 1, 0.5, 0.25, 0.125]
    assert [m[reduce_on_plateau.BEST] for m in lines] == [None] * 4 + [5.0] * 4


def cut(options, folder, monkeypatch, step: int, when: str) -> None:
    """Train until the evaluation at `step`, and die before it, or after its line is written."""
    if when == "before":
        run_evaluator = evaluate.Evaluator.run

        def ending(evaluator, params, at):
            if at == step:
                raise KeyboardInterrupt
            return run_evaluator(evaluator, params, at)

        monkeypatch.setattr(evaluate.Evaluator, "run", ending)
    else:
        write = metric_files.MetricWriter.write

        def writing(writer, at, metrics):
            write(writer, at, metrics)
            if at == step and reduce_on_plateau.SCALE in metrics:
                raise KeyboardInterrupt

        monkeypatch.setattr(metric_files.MetricWriter, "write", writing)
    with pytest.raises(KeyboardInterrupt):
        faults.run_here(options, folder)
    monkeypatch.undo()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("save_period, step", [(4, 24), (5, 28)])
def test_a_run_that_is_cut_at_an_evaluation(whole, tmp_path, monkeypatch, save_period, step, when):
    """Killed before or after an evaluation it resumes with the same rates, to the bit.

    It resumes at step 24, whose evaluation may be missing, and at 25, after that of 24. An
    evaluation that counts twice would halve the rate twice. Oracle: state, metrics and progress of
    the run that was not cut.
    """
    options, expected = whole(save_period)
    cut(options, tmp_path, monkeypatch, step, when)
    faults.run_here(options, tmp_path)
    assert rates(tmp_path) == rates(expected)
    assert faults.results(tmp_path) == faults.results(expected)


def test_a_lost_metrics_file_costs_no_reduction(whole, tmp_path, monkeypatch):
    """The checkpoint has the state: oracle: the rates of the run that was not cut."""
    options, expected = whole(5)
    cut(options, tmp_path, monkeypatch, 28, "after")
    (tmp_path / "metrics.jsonl").unlink()
    faults.run_here(options, tmp_path)
    found = rates(tmp_path)
    assert found and found == {step: rates(expected)[step] for step in found}


def test_a_metric_that_is_not_measured(tmp_path):
    """Oracle: DESIGN, habit 3: the error names those there are, at the first evaluation."""
    options = {**RUN, "perplexity": {}}
    with pytest.raises(UserError, match=r"PLATEAU_METRIC='eval/all/perplexity' is not .* step 4 "):
        faults.run_here(options, tmp_path)


def test_a_run_says_when_the_rate_falls(tmp_path, caplog):
    """Oracle: by hand, of VALUES, with early stopping on the same metric beside it."""
    caplog.set_level(logging.INFO, "cosmo")
    state = faults.run_here({**RUN, "save_period": 4, "patience": 4}, tmp_path)
    assert int(state.step) == 24  # 8 is early stopping's best: it counts the warm-up too
    assert (
        "step 24: eval/all/perplexity has not improved for 1 evaluations (best 5): the learning "
        "rate is now 0.5 times the schedule's" in caplog.text
    )
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last[reduce_on_plateau.SCALE] == 0.5


def test_an_evaluation_is_never_silent(tmp_path, monkeypatch, caplog):
    """The one before training and the one after a step both log while they last.

    Oracle: the lines' count, with a heartbeat every 50 ms and evaluations of 1 s.
    """
    caplog.set_level(logging.INFO, "cosmo")
    monkeypatch.setattr(silence, "HEARTBEAT_SECONDS", 0.05)
    options = {"total_steps": 2, "eval_period": 2, "slow_evaluation": 1.0}
    heard = []
    run = evaluate.Evaluator.run

    def counted(evaluator, params, at):
        before = caplog.text.count("evaluating: ")
        results = run(evaluator, params, at)
        heard.append((at, caplog.text.count("evaluating: ") - before > 0))
        return results

    monkeypatch.setattr(evaluate.Evaluator, "run", counted)
    faults.run_here(options, tmp_path, run_before_training=True)
    assert heard == [(0, True), (2, True)]


def test_steps_between_reports_are_shown(tmp_path, monkeypatch, caplog):
    """A slow machine takes minutes from report to report; lines come by the clock all the same.

    Oracle: by hand: a line a step, as the lines' period is 0; the loss is that of the newest
    report, whose step is named.
    """
    caplog.set_level(logging.INFO, "cosmo")
    monkeypatch.setattr(train, "Progress", functools.partial(progress.Progress, every_seconds=0))
    monkeypatch.setattr(train, "SOON_SECONDS", 0)
    faults.run_here({"total_steps": 6, "stats_period": 4, "save_period": 6}, tmp_path)
    lines = [m for m in caplog.messages if m.startswith("step ") and "/6 " in m]
    assert [line.split()[1] for line in lines] == [f"{n}/6" for n in range(1, 7)]
    assert ["loss" in line for line in lines] == [False] * 3 + [True] * 3
    assert ["at step 4" in line for line in lines] == [False] * 4 + [True, False]


@pytest.mark.parametrize("found", [None, PlateauState(4.1, 2, 0.3)])
def test_processes_agree_on_the_state(monkeypatch, found):
    """A process that does not see the newest evaluation takes another's state, to the bit.

    Oracle: by hand: the state of the process that sees it, else the checkpoint's.
    """
    saved, gathered = PlateauState(None, 1, 0.7), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def process_allgather(row):
        gathered.append(row)
        return np.stack(gathered if len(gathered) > 1 else [row, row])

    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    for seen in (None, found):
        state = reduce_on_plateau._same_in_all_processes(seen, saved)
    assert state == (found or saved)
