"""The training run: data in, steps, evaluations and checkpoints out. Reads top to bottom."""

import contextlib
import functools
import importlib.util
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import only_writer, prepare_folder
from cosmo.engine.base.progress import Progress, heartbeat
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.checkpoints import run_checkpoints, saving
from cosmo.engine.checkpoints.description import check_vocabulary, describe
from cosmo.engine.data import datasets, reader, rows
from cosmo.engine.model import models, partitioning
from cosmo.engine.model.step import (
    StepConfig,
    TrainState,
    compile_step,
    init_state,
    state_shardings,
)
from cosmo.engine.scale import sizing
from cosmo.engine.train import early_stopping, guard, metric_files, preemption

log = logging.getLogger(__name__)

TOKEN_FEATURES = ("encoder_input_tokens", "decoder_target_tokens")
MIN_INPUT_WAIT_SHOWN = 0.03  # show the input-wait share in the progress line above 3%


class Evaluator(Protocol):
    """Measures parameters on validation data; `evaluate.Evaluator` is one."""

    def check(self) -> None:
        """Raise UserError, before the first step, if a validation set does not exist."""

    def run(self, params: models.Params, step: int) -> dict[str, float]:
        """Return metrics by name."""


class Evaluation(Protocol):
    """When to evaluate, and with what; `evaluate.EvalConfig` is one.

    The loop knows this interface alone, so that reading it needs no file about generation.
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
    bad_steps: guard.GuardConfig = guard.GuardConfig(),
    early_stop: early_stopping.StoppingConfig = early_stopping.StoppingConfig(),
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
    for name, value in (("TRAIN_STEPS", total_steps), ("STATS_PERIOD", stats_period)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r}; give a whole number of at least 1")
    folder = prepare_folder(model_dir)
    check_vocabulary(model, vocabulary)
    chosen = sizing.choose_here(model, step, partitioner, datasets.abstract_batch(dataset))
    model, step, partitioner = sizing.settle(model, step, partitioner, chosen)
    layout = partitioner.layout(partitioner.mesh())
    mesh = layout.mesh
    partitioning.check_batch_size(dataset.batch_size, mesh, step.num_microbatches, "BATCH_SIZE")
    description = describe(model, vocabulary)
    if dataset.cache_path is not None:
        rows.open_cache(dataset, vocabulary)  # refuses another vocabulary or length
    evaluating = evaluation is not None and evaluation.period is not None
    if evaluating and importlib.util.find_spec("seqio") is None:
        raise UserError(
            "evaluation reads its split through SeqIO: pip install -e '.[seqio]', or train from a "
            "cache without evaluation",
            setting=("CACHE_PATH", "EVAL_PERIOD"),
        )
    if evaluating or dataset.cache_path is None:
        reader.start()  # its imports take seconds: they overlap with all that follows
    save_period = checkpoint.save_period or (evaluation.period if evaluating else total_steps)
    early_stop.check(evaluation.period if evaluating else None, save_period)
    evaluator = evaluation.open(model, vocabulary, layout, random_seed) if evaluating else None
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as closing:
        if first_process:
            closing.enter_context(only_writer(folder))
        notice = closing.enter_context(preemption.listen())
        saver = saving.Saver(model_dir, checkpoint)
        closing.callback(saver.close)  # waits for a save in progress
        closing.enter_context(_interrupt_names_kept_step(saver))
        notice.leave_at_once(lambda: f"stopped by SIGTERM before a step was done: {saver.kept()}")
        resuming = saver.newest is not None
        done = saver.newest if resuming else checkpoint.restore.step()
        # The last run saved this step but stopped before its evaluation finished: evaluate first.
        evaluate_first = (
            resuming
            and evaluating
            and (done % evaluation.period == 0 or done == total_steps)
            and not saving.anywhere(metric_files.has(model_dir, done, "eval/"))
        )
        start_step = done if resuming else 0
        stopping = early_stopping.Stopping(
            early_stop, model_dir, start_step, saver, enabled=first_process
        )
        if resuming and (done == total_steps or stopping.finished) and not evaluate_first:
            if done == total_steps:
                log.info("%s is finished: it is at step %d, which is TRAIN_STEPS", model_dir, done)
            stopping.say(done)
            wanted = run_checkpoints.abstract_like(*state_shardings(model, step, partitioner, mesh))
            return saver.restore(wanted, description)
        if done > total_steps or (done == total_steps and not resuming):
            whose = model_dir if resuming else f"{checkpoint.restore.path}, whose steps count,"
            raise UserError(
                f"{whose} is at step {done} and TRAIN_STEPS={total_steps}: nothing to do"
            )

        # Reading starts now: importing TensorFlow and filling buffers overlaps with compilation.
        saved, left = saver.progress(), total_steps - done
        start = {"start_step": done, "num_steps": left, "position": saved.get("data")}
        batches = reader.train_batches(dataset, **start, **datasets.process_shard())
        closing.callback(batches.close)
        abstract, shardings = state_shardings(model, step, partitioner, mesh)
        with heartbeat("compiling the train step"):
            run_step = compile_step(
                model,
                step,
                datasets.abstract_batch(dataset),
                layout,
                abstract,
                shardings,
                random_seed,
                bad_steps.skips,
            )
        state = _start_state(
            saver, checkpoint.restore, model, step, abstract, shardings, description, random_seed
        )
        if first_process:
            run_checkpoints.keep_vocabulary(model_dir, vocabulary.path)
        first = _on_device(next(batches), mesh)  # now all settings have been read
        if summarize_config is not None and first_process:
            for name, text in summarize_config().items():
                write_atomic(folder / name, text)

        begun = done if resuming else 0  # files of an attempt that left no checkpoint start anew
        board = metric_files.MetricWriter(model_dir, begun, enabled=first_process)
        closing.callback(board.close)
        guarding = guard.Guard(
            bad_steps,
            model_dir,
            begun,
            saved.get("guard"),
            kept=functools.partial(saver.kept, wait=True),
            enabled=first_process,
        )
        progress = Progress(total_steps, done)
        closing.callback(progress.finish)
        if evaluating:
            evaluator.check()
            if evaluate_first or (evaluation.run_before_training and not resuming):
                results = evaluator.run(state.params, done)
                board.write(done, stopping.add(done, results) if evaluate_first else results)
        notice.leave_at_once(None)

        def keep(batch: _DeviceBatch) -> None:
            board.flush()
            remember = {"data": batch.host.position, "guard": guarding.progress()}
            saver.save(done, state, description, remember)

        tokens, steps, since = 0, 0, time.monotonic()
        batch, waited = first, 0.0
        while done < total_steps and not stopping.finished:
            tokens += batch.tokens
            steps += 1
            limit = guarding.limit(done + 1)
            further = (limit,) if bad_steps.skips else ()
            state, sums = run_step(state, batch.arrays, *further)
            done += 1
            # The sums are on the device still, so that steps queue up.
            guarding.add(done, sums, batch.host, limit)
            last = done == total_steps
            stop = not last and notice.reached(done)
            save_now = done % save_period == 0 or last
            evaluate_now = evaluating and (done % evaluation.period == 0 or last)
            if done % stats_period == 0 or save_now or evaluate_now:
                values = guarding.report()
                elapsed = time.monotonic() - since
                values["tokens_per_second"] = tokens * jax.process_count() / elapsed
                values["steps_per_second"] = steps / elapsed
                values["input_wait"] = waited / elapsed
                board.write(done, {f"train/{name}": value for name, value in values.items()})
                note = f"loss {values.get('loss', math.nan):.4f}, "
                note += f"{values['tokens_per_second']:.0f} tokens/s,"
                if values["input_wait"] > MIN_INPUT_WAIT_SHOWN:
                    note += f" {values['input_wait']:.0%} waiting for input,"
                progress.update(done, note, force=last)
                tokens, steps, waited, since = 0, 0, 0.0, time.monotonic()
            if save_now:  # before evaluation: whatever happens there, the steps are kept
                keep(batch)
            if evaluate_now and not stop:
                progress.finish()
                try:
                    with notice.interrupting(), heartbeat("evaluating"):
                        results = evaluator.run(state.params, done)
                    board.write(done, stopping.add(done, results))
                except preemption.Stopped:
                    stop = True  # the next start evaluates
            if stop and not save_now:
                keep(batch)
            if save_now or evaluate_now:
                since = time.monotonic()  # a rate is of training alone
            if last or stop or stopping.finished:
                break
            if reader.would_wait(batches):
                jax.block_until_ready(sums)  # time that the devices still compute is no waiting
            asked = time.monotonic()
            host_batch = next(batches)
            waited += time.monotonic() - asked
            batch = _on_device(host_batch, mesh)
        saver.wait()  # a save that failed in the background is an error here
        if notice.interrupted:
            raise KeyboardInterrupt
        if done == total_steps or stopping.finished:
            stopping.say(done)
    return state


class _DeviceBatch(NamedTuple):
    """A `datasets.TrainBatch` on the devices; `tokens` are those of this process's rows."""

    arrays: dict[str, jax.Array]
    host: datasets.TrainBatch
    tokens: int


def _on_device(batch: datasets.TrainBatch, mesh: jax.sharding.Mesh) -> _DeviceBatch:
    """Start the transfer of a batch to the devices; the next step does not wait for it."""
    tokens = sum(np.count_nonzero(batch.arrays[name]) for name in TOKEN_FEATURES)
    return _DeviceBatch(partitioning.put_batch(batch.arrays, mesh), batch, tokens)


def _start_state(
    saver: saving.Saver,
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
        # Built under jit, each device makes its own part: no host holds the whole state.
        return jax.jit(lambda: init_state(model, step, seed), out_shardings=shardings)()
    opt_state = start.opt_state
    if opt_state is None:
        init = jax.jit(step.transformation().init, out_shardings=shardings.opt_state)
        opt_state = init(start.params)
    count = jax.device_put(np.int32(start.step), shardings.step)
    return TrainState(count, start.params, opt_state)


@contextlib.contextmanager
def _interrupt_names_kept_step(saver: saving.Saver):
    """Add the newest saved step to the message of Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        kept = saver.kept(wait=True)
        raise KeyboardInterrupt(f"{kept}; the same command goes on from there") from None
