"""Train: read batches, run steps, evaluate, save. Reads top to bottom."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from cosmo.engine.base import saved_settings
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import only_writer, prepare_folder
from cosmo.engine.base.progress import Progress, heartbeat
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.checkpoints import run_checkpoints
from cosmo.engine.checkpoints.checkpoint_writer import CheckpointWriter, any_process
from cosmo.engine.checkpoints.description import check_positions, check_vocabulary, describe
from cosmo.engine.data import cache_reading, datasets, reader
from cosmo.engine.model import models, partitioning
from cosmo.engine.model.optimizer import LearningRateSchedule
from cosmo.engine.model.step import (
    StepConfig,
    TrainState,
    compile_step,
    init_sharded_state,
    state_shardings,
)
from cosmo.engine.scale import chips, sizing
from cosmo.engine.train import early_stopping, metric_files, preemption
from cosmo.engine.train.bad_steps import BadStepConfig, BadStepMonitor

log = logging.getLogger(__name__)

TOKEN_FEATURES = ("encoder_input_tokens", "decoder_target_tokens")
SOON_SECONDS = 2  # a report that is expected within so long is waited for
MIN_INPUT_WAIT_SHOWN = 0.03  # show the input-wait share in the progress line above 3%


class Evaluator(Protocol):
    """Measures parameters on validation data; `evaluate.Evaluator` is one."""

    def check(self) -> None:
        """Raise UserError, before the first step, if a validation set does not exist."""

    def run(self, params: models.Params, step: int) -> dict[str, float]:
        """Return metrics by name."""


class Evaluation(Protocol):
    """When to evaluate, and with what; `evaluate.EvalConfig` is one.

    The loop imports this interface alone, so that reading it needs no file about generation.
    """

    period: int | None  # steps; None: never
    run_before_training: bool

    def open(
        self,
        model: models.EncoderDecoderModel,
        vocabulary: Vocabulary,
        layout: partitioning.Layout,
        seed: int,
    ) -> Evaluator:
        """Return the evaluator of a run."""


class RateScale(Protocol):
    """A factor of the learning rate that evaluations change; `reduce_on_plateau.Plateau` is one."""

    value: np.float32  # an argument of the step

    def add(self, step: int, results: dict[str, float]) -> dict[str, float]:
        """Count an evaluation, and return the metrics to write."""

    def progress(self) -> dict[str, Any]:
        """Return the state as JSON, for a checkpoint."""


class RateReduction(Protocol):
    """When to reduce the learning rate; `reduce_on_plateau.PlateauConfig` is one."""

    factor: float | None  # None: never

    def check(self, eval_period: int | None) -> None:
        """Raise UserError if a run with this period of evaluations cannot reduce its rate."""

    def open(
        self,
        schedule: LearningRateSchedule,
        model_dir: str,
        start_step: int,
        saved: dict[str, Any] | None,
    ) -> RateScale:
        """Return the factor of a run that resumes at `start_step`; `saved` is from `progress`."""


class Tracking(Protocol):
    """Where metrics go beside the run's folder; `trackers.TrackerConfig` is one."""

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""

    def open(self, model_dir: str, settings: dict[str, Any]) -> metric_files.Tracker | None:
        """Start or continue the run at the tracker; None if there is none."""


def train(
    *,
    model: models.EncoderDecoderModel,
    vocabulary: Vocabulary,
    dataset: datasets.DatasetConfig,
    model_dir: str,
    total_steps: int,
    step: StepConfig = StepConfig(),
    evaluation: Evaluation | None = None,
    checkpoint: run_checkpoints.CheckpointConfig = run_checkpoints.CheckpointConfig(),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),
    bad_steps: BadStepConfig = BadStepConfig(),
    early_stop: early_stopping.StoppingConfig = early_stopping.StoppingConfig(),
    plateau: RateReduction | None = None,
    tracker: Tracking | None = None,
    stats_period: int = 100,
    random_seed: int = 0,
    summarize_config: Callable[[], dict[str, str]] | None = None,
) -> TrainState:
    """Train until step `total_steps`, and return the final state.

    As in T5X, the steps of a starting checkpoint count. A run that finds checkpoints in `model_dir`
    continues from the newest sound one, with the numbers of an uninterrupted run. On SIGTERM or
    Ctrl-C it finishes the running step, saves and ends. It writes checkpoints/, metrics.jsonl,
    tensorboard/ and the files of `summarize_config` ({name: text}) to `model_dir`.

    Raises UserError for settings that do not fit together, before anything is compiled.
    """
    # 1. Settings: what can be wrong with them is an error before anything takes long.
    for name, value in (("TRAIN_STEPS", total_steps), ("STATS_PERIOD", stats_period)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r}; give a whole number of at least 1")
    if tracker is not None:
        tracker.check()
    folder = prepare_folder(model_dir)
    check_vocabulary(model, vocabulary)
    check_positions(model, dataset.task_feature_lengths)
    batch_shapes = datasets.abstract_batch(dataset)
    model = sizing.choose_attention(
        model, batch_shapes, chips.by_kind(jax.devices()[0].device_kind)
    )
    chosen = sizing.choose_for_this_run(model, step, partitioner, batch_shapes)
    model, step, partitioner = sizing.apply_device_settings(model, step, partitioner, chosen)
    layout = partitioner.layout(partitioner.mesh())
    mesh = layout.mesh
    partitioning.check_batch_size(dataset.batch_size, mesh, step.num_microbatches, "BATCH_SIZE")
    description = describe(model, vocabulary)
    if dataset.cache_path is not None:
        cache_reading.open_cache(dataset, vocabulary)  # refuses another vocabulary or length
    if evaluation is not None and evaluation.period is None:
        evaluation = None
    if evaluation is not None and importlib.util.find_spec("seqio") is None:
        raise UserError(
            "evaluation reads its split through SeqIO: pip install -e '.[seqio]', or train from a "
            "CACHE_PATH and turn evaluation off with None",
            setting="EVAL_PERIOD",
        )
    if evaluation is not None or dataset.cache_path is None:
        reader.start()  # its imports take seconds: they overlap with all that follows
    save_period = checkpoint.save_period or (evaluation.period if evaluation else total_steps)
    early_stop.check(evaluation.period if evaluation else None, save_period)
    if plateau is not None and plateau.factor is None:
        plateau = None
    if plateau is not None:
        plateau.check(evaluation.period if evaluation else None)
    evaluator = evaluation.open(model, vocabulary, layout, random_seed) if evaluation else None
    first_process = jax.process_index() == 0

    def is_evaluated(number: int) -> bool:
        return evaluation is not None and (number % evaluation.period == 0 or number == total_steps)

    with contextlib.ExitStack() as closing:
        if first_process:
            closing.enter_context(only_writer(folder))  # two runs would mix their checkpoints
        # 2. The step to start from, and whether there is anything left to do.
        notice = closing.enter_context(preemption.listen())
        saver = CheckpointWriter(model_dir, checkpoint)
        closing.callback(saver.close)  # waits for a save in progress
        closing.enter_context(_interrupt_names_kept_step(saver))
        notice.leave_at_once(lambda: f"stopped by SIGTERM before a step was done: {saver.kept()}")
        resuming = saver.newest is not None
        done = saver.newest if resuming else checkpoint.restore.step()
        # The last run saved this step but stopped before its evaluation finished: evaluate first.
        # One process may see an older file than another: if any has the evaluation, none repeats it
        evaluate_first = (
            resuming
            and is_evaluated(done)
            and not any_process(metric_files.has_metric(model_dir, done, "eval/"))
        )
        # Files of an attempt that left no checkpoint start anew, as its steps are done again.
        resumed_step = done if resuming else 0
        stopping = early_stopping.Stopping(
            early_stop, model_dir, resumed_step, saver, enabled=first_process
        )
        if resuming and (done == total_steps or stopping.finished) and not evaluate_first:
            if done == total_steps:
                log.info("%s is finished: it is at step %d, which is TRAIN_STEPS", model_dir, done)
            stopping.log_result(done)
            wanted = run_checkpoints.abstract_like(*state_shardings(model, step, partitioner, mesh))
            return saver.restore(wanted, description)
        if done > total_steps or (done == total_steps and not resuming):
            whose = model_dir if resuming else f"{checkpoint.restore.path}, whose steps count,"
            raise UserError(
                f"{whose} is at step {done} and TRAIN_STEPS={total_steps}: nothing to do"
            )

        # 3. Data, the compiled step and the state. Reading starts first: importing TensorFlow and
        # filling buffers overlap with compilation.
        saved, left = saver.read_progress(), total_steps - done
        start = {"start_step": done, "num_steps": left, "position": saved.get("data")}
        batches = reader.train_batches(dataset, **start, **datasets.process_shard())
        closing.callback(batches.close)
        abstract, shardings = state_shardings(model, step, partitioner, mesh)
        with heartbeat("compiling the train step"):
            run_step = compile_step(
                *(model, step, batch_shapes, layout, abstract, shardings, random_seed),
                skips=bad_steps.skips,
                scales=plateau is not None,
            )
        with heartbeat("reading or making the parameters"):
            state = _start_state(
                *(saver, checkpoint.restore, model, step, abstract, shardings),
                *(description, random_seed),
            )
        with heartbeat("waiting for the first batch"):
            batch = _on_device(next(batches), mesh)
        # Only now are files written: every setting has been used, so none of them is wrong.
        tracking = None
        if first_process:
            run_checkpoints.copy_vocabulary(model_dir, vocabulary.path)
            files = summarize_config() if summarize_config is not None else {}
            for name, text in files.items():
                write_atomic(folder / name, text)
            if tracker is not None:
                settings = json.loads(files.get(saved_settings.FILE, "{}"))
                tracking = tracker.open(model_dir, settings)
        board = metric_files.MetricWriter(
            model_dir, resumed_step, enabled=first_process, tracker=tracking
        )
        closing.callback(board.close)
        monitor = BadStepMonitor(
            bad_steps,
            model_dir,
            resumed_step,
            saved.get("guard"),  # the name in the checkpoints of every version
            kept=functools.partial(saver.kept, wait=True),
            enabled=first_process,
        )
        rate_scale: RateScale | None = None
        if plateau is not None:
            rate_scale = plateau.open(
                step.learning_rate, model_dir, resumed_step, saved.get("plateau")
            )

        def count_evaluation(results: dict[str, float]) -> dict[str, float]:
            results = stopping.add(done, results)
            return results if rate_scale is None else rate_scale.add(done, results)

        if evaluator is not None:
            evaluator.check()  # a split that is missing is an error now, not after hours
            if evaluate_first or (evaluation.run_before_training and not resuming):
                log.info("evaluating at step %d, before training", done)
                with heartbeat("evaluating"):
                    results = evaluator.run(state.params, done)
                board.write(done, count_evaluation(results) if evaluate_first else results)
        notice.leave_at_once(None)  # from here on there are steps to save
        progress = Progress(total_steps, done)  # whose rate counts from here
        closing.callback(progress.finish)

        def save() -> None:
            # Before the checkpoint: a resumed run writes no older step again.
            board.flush()
            # A checkpoint written on SIGTERM also stores the metric sums since the last report, so
            # the next report equals an uninterrupted run's.
            remember = {"data": batch.host.position, "guard": monitor.progress()}
            if rate_scale is not None:
                remember["plateau"] = rate_scale.progress()
            saver.save(done, state, description, remember)

        # 4. The loop.
        rates, note = _Rates(), ""
        while done < total_steps and not stopping.finished:
            rates.tokens += batch.tokens
            rates.steps += 1
            limit = monitor.limit(done + 1)
            bound = limit if bad_steps.skips else None
            scale = None if rate_scale is None else rate_scale.value
            state, sums = run_step(state, batch.arrays, bound, scale)
            done += 1
            # The sums are on the device still, so that steps queue up.
            monitor.add(done, sums, batch.host, limit)
            last = done == total_steps
            stop = not last and notice.reached(done)
            save_now = done % save_period == 0 or last
            evaluate_now = is_evaluated(done)
            if done % stats_period == 0 or save_now or evaluate_now:
                values = {**monitor.report(), **rates.report()}
                board.write(done, {f"train/{name}": value for name, value in values.items()})
                note = _note(values)
                progress.update(done, note, force=last)
                note += f" at step {done}"
                rates = _Rates()
            elif stats_period - done % stats_period > SOON_SECONDS * progress.rate:
                # A period of reports may take minutes on a slow machine.
                progress.update(done, note)
            if save_now:  # before evaluation: its failure then costs no step
                save()
            if evaluate_now and not stop:
                progress.finish()
                try:
                    with notice.interrupting(), heartbeat("evaluating"):
                        results = evaluator.run(state.params, done)
                    board.write(done, count_evaluation(results))
                except preemption.Stopped:
                    stop = True  # the next start evaluates
            if stop and not save_now:
                save()
            if save_now or evaluate_now:
                rates = _Rates()  # a rate counts training alone
            # Here, not in the loop's condition: the last step needs no further batch.
            if last or stop or stopping.finished:
                break
            # The devices may be busy still. Only time that they spend idle is waiting for input.
            if reader.would_wait(batches):
                jax.block_until_ready(sums)
            asked = time.monotonic()
            host_batch = next(batches)
            rates.waited += time.monotonic() - asked
            batch = _on_device(host_batch, mesh)
        saver.wait()  # a save that failed in the background is an error here
        # Saved like SIGTERM; then Ctrl-C ends the command as its user expects.
        if notice.interrupted:
            raise KeyboardInterrupt
        if done == total_steps or stopping.finished:
            stopping.log_result(done)
    return state


@dataclasses.dataclass
class _Rates:
    """Counts of this process since `since`, seconds on the monotonic clock."""

    tokens: int = 0
    steps: int = 0
    waited: float = 0.0  # seconds for input
    since: float = dataclasses.field(default_factory=time.monotonic)

    def report(self) -> dict[str, float]:
        """Return tokens (of all processes) and steps a second, and the share of time waited."""
        elapsed = time.monotonic() - self.since
        return {
            "tokens_per_second": self.tokens * jax.process_count() / elapsed,
            "steps_per_second": self.steps / elapsed,
            "input_wait": self.waited / elapsed,
        }


def _note(values: dict[str, float]) -> str:
    """Return the part of the progress line that shows training metrics."""
    # A window of nothing but skipped steps has no loss.
    note = f"loss {values.get('loss', math.nan):.4f}, {values['tokens_per_second']:.0f} tokens/s,"
    if values["input_wait"] > MIN_INPUT_WAIT_SHOWN:
        note += f" {values['input_wait']:.0%} waiting for input,"
    return note


class _DeviceBatch(NamedTuple):
    """A `datasets.TrainBatch` on the devices; `tokens` counts those of this process's rows."""

    arrays: dict[str, jax.Array]
    host: datasets.TrainBatch
    tokens: int


def _on_device(batch: datasets.TrainBatch, mesh: jax.sharding.Mesh) -> _DeviceBatch:
    """Start the transfer of a batch to the devices; the next step does not wait for it."""
    # Padding is 0, so this counts real tokens. It is numpy's work, before the device has the rows.
    tokens = sum(np.count_nonzero(batch.arrays[name]) for name in TOKEN_FEATURES)
    return _DeviceBatch(partitioning.put_batch(batch.arrays, mesh), batch, tokens)


def _start_state(
    saver: CheckpointWriter,
    initial: run_checkpoints.StartingPoint,
    model: models.EncoderDecoderModel,
    step: StepConfig,
    abstract: TrainState,
    shardings: TrainState,
    description: dict[str, Any],
    seed: int,
) -> TrainState:
    """Return this run's newest checkpoint, else the initial one, else fresh parameters."""
    if saver.newest is not None:
        log.info("resuming at step %d from %s", saver.newest, saver.folder)
        return saver.restore(run_checkpoints.abstract_like(abstract, shardings), description)
    start = initial.read(abstract, shardings, description)
    if start is None:
        log.info("starting from fresh parameters (seed %d)", seed)
        return init_sharded_state(model, step, seed, shardings)
    opt_state = start.opt_state
    if opt_state is None:
        init = jax.jit(step.transformation().init, out_shardings=shardings.opt_state)
        opt_state = init(start.params)
    count = jax.device_put(np.int32(start.step), shardings.step)
    return TrainState(count, start.params, opt_state)


@contextlib.contextmanager
def _interrupt_names_kept_step(saver: CheckpointWriter) -> Iterator[None]:
    """Add the newest saved step to the message of Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        kept = saver.kept(wait=True)
        raise KeyboardInterrupt(f"{kept}; the same command continues from there") from None
