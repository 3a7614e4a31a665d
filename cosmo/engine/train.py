"""The training run: data in, steps, evaluations and checkpoints out. Reads top to bottom."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cosmo.engine import (
    checkpoints,
    data,
    evaluate,
    infer,
    metrics,
    models,
    partitioning,
    rows,
    writer,
)
from cosmo.engine.errors import UserError
from cosmo.engine.interop import sources
from cosmo.engine.prefetch import Prefetcher
from cosmo.engine.step import (
    StepConfig,
    Sums,
    TrainState,
    init_state,
    make_train_step,
    state_shardings,
)
from cosmo.engine.writer import log

TOKEN_FEATURES = ("encoder_input_tokens", "decoder_target_tokens")
WORTH_SAYING = 0.03  # the share of the time spent waiting for input that the progress line names


def train(
    *,
    model: models.EncoderDecoderModel,
    vocabulary: infer.Vocabulary,
    dataset: data.DatasetConfig,
    model_dir: str,
    total_steps: int,
    step: StepConfig = StepConfig(),
    evaluation: evaluate.EvalConfig | None = None,
    checkpoint: checkpoints.CheckpointConfig = checkpoints.CheckpointConfig(),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),
    stats_period: int = 100,
    random_seed: int = 0,
    summarize_config: Callable[[], str] | None = None,
) -> TrainState:
    """Train until step `total_steps` (T5X's meaning: steps of a starting checkpoint count).

    A run that finds checkpoints in `model_dir` goes on from the latest. Leaves there checkpoints/,
    metrics.jsonl, tensorboard/ and config.gin; returns the final state.
    """
    for name, value in (("TRAIN_STEPS", total_steps), ("STATS_PERIOD", stats_period)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r}; give a whole number of at least 1")
    folder = writer.prepare_folder(model_dir)
    infer.check_vocabulary(model, vocabulary)
    mesh = partitioner.mesh()
    partitioning.check_batch_size(dataset.batch_size, mesh, step.num_microbatches, "BATCH_SIZE")
    description = infer.describe(model, vocabulary)
    if dataset.cache_path is not None:
        rows.open_cache(dataset, vocabulary)  # another vocabulary or length is said at once
    evaluating = evaluation is not None and evaluation.period is not None
    evaluator = _Evaluator(evaluation, model, vocabulary, mesh, random_seed)
    with contextlib.ExitStack() as closing:
        saver = checkpoints.manager(model_dir, checkpoint.keep)
        closing.callback(saver.close)  # waits for what is still being written
        resuming = saver.latest_step() is not None
        done = saver.latest_step() if resuming else _starting_step(checkpoint.restore)
        if done >= total_steps:
            whose = model_dir if resuming else f"{checkpoint.restore.path}, whose steps count,"
            raise UserError(
                f"{whose} is at step {done} and TRAIN_STEPS={total_steps}: nothing to do"
            )

        # Reading starts now: importing TensorFlow and filling buffers overlaps with compilation.
        position = checkpoints.progress(saver, done).get("data") if resuming else None
        start = {"start_step": done, "num_steps": total_steps - done, "position": position}
        batches = Prefetcher(lambda: _on_device(dataset, start, mesh))
        closing.callback(batches.close)
        abstract, shardings = state_shardings(model, step, partitioner, mesh)
        run_step = compile_step(model, step, dataset, mesh, abstract, shardings, random_seed)
        state = _start_state(
            saver, checkpoint.restore, model, step, abstract, shardings, description, random_seed
        )
        if jax.process_index() == 0:
            checkpoints.keep_vocabulary(model_dir, vocabulary.path)
        first = next(batches)  # now all settings have been read, the reader's too
        if summarize_config is not None and jax.process_index() == 0:
            writer.write_atomic(folder / "config.gin", summarize_config())

        board = writer.MetricWriter(model_dir, done, enabled=jax.process_index() == 0)
        closing.callback(board.close)
        progress = writer.Progress(total_steps, done)
        closing.callback(progress.finish)
        if evaluating:
            evaluator.check()
            if evaluation.run_before_training and not resuming:
                board.write(done, evaluator.run(state.params, done))

        pending: list[tuple[int, Sums]] = []  # sums still on the device, so that steps queue up
        save_period = checkpoint.save_period or (evaluation.period if evaluating else total_steps)
        tokens, since = 0, time.monotonic()
        batch, waited = first, 0.0
        while True:
            tokens += batch.tokens
            state, sums = run_step(state, batch.arrays)
            done += 1
            pending.append((done, sums))
            last = done == total_steps
            save_now = done % save_period == 0 or last
            evaluate_now = evaluating and (done % evaluation.period == 0 or last)
            if done % stats_period == 0 or save_now or evaluate_now:
                values = _report(pending, saver)
                elapsed = time.monotonic() - since
                values["tokens_per_second"] = tokens * jax.process_count() / elapsed
                values["steps_per_second"] = len(pending) / elapsed
                values["input_wait"] = waited / elapsed
                board.write(done, {f"train/{name}": value for name, value in values.items()})
                note = f"loss {values['loss']:.4f}, {values['tokens_per_second']:.0f} tokens/s,"
                if values["input_wait"] > WORTH_SAYING:
                    note += f" {values['input_wait']:.0%} waiting for input,"
                progress.update(done, note, force=last)
                pending.clear()
                tokens, since, waited = 0, time.monotonic(), 0.0
            if save_now:  # before evaluation: whatever happens there, the steps are kept
                checkpoints.save(saver, done, state, description, {"data": batch.position})
            if evaluate_now:
                progress.finish()
                board.write(done, evaluator.run(state.params, done))
            if save_now or evaluate_now:
                since = time.monotonic()  # a rate is of training alone
            if last:
                break
            if batches.is_empty():
                jax.block_until_ready(sums)  # what the devices still compute is no waiting
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
        saver.wait_until_finished()  # a save that failed in the background is an error here
    return state


class _DeviceBatch(NamedTuple):
    """A `data.TrainBatch` on the devices; `tokens` are those of this process's rows."""

    arrays: dict[str, jax.Array]
    position: Any
    rows: np.ndarray | None
    tokens: int


def _on_device(dataset: data.DatasetConfig, start: dict[str, Any], mesh: Mesh):
    """Training batches, each on its way to the devices: run ahead, the transfer costs no step."""
    for batch in data.train_batches(dataset, **start, **data.process_shard()):
        tokens = sum(np.count_nonzero(batch.arrays[name]) for name in TOKEN_FEATURES)
        arrays = partitioning.put_batch(batch.arrays, mesh)
        yield _DeviceBatch(arrays, batch.position, batch.rows, tokens)


def compile_step(
    model: models.EncoderDecoderModel,
    step: StepConfig,
    dataset: data.DatasetConfig,
    mesh: Mesh,
    abstract: TrainState,
    shardings: TrainState,
    seed: int,
) -> jax.stages.Compiled:
    """The train step, compiled before there is a state or a batch; the old state is donated."""
    rows = partitioning.batch_sharding(mesh)
    jitted = jax.jit(
        make_train_step(model, step, seed),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, partitioning.replicated(mesh)),
        donate_argnums=0,
    )
    began = time.monotonic()
    compiled = jitted.lower(abstract, data.abstract_batch(dataset)).compile()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    log.info(
        "%s parameters on %d %s device(s); train step compiled in %.1f s",
        f"{count:,}",
        mesh.size,
        jax.default_backend(),
        time.monotonic() - began,
    )
    return compiled


def _starting_step(restore: checkpoints.RestoreConfig) -> int:
    return checkpoints.locate(restore.path).step if restore.path else 0


def _start_state(
    saver, restore, model, step: StepConfig, abstract, shardings, description, seed
) -> TrainState:
    """The latest checkpoint of this run, else the one to start from, else fresh parameters."""
    wanted = checkpoints.abstract_like(abstract, shardings)
    latest = saver.latest_step()
    if latest is not None:
        log.info("resuming at step %d from %s", latest, saver.directory)
        return checkpoints.restore(saver, latest, wanted, description)
    if restore.path and restore.restore_optimizer_state:
        model_dir, start, format = checkpoints.locate(restore.path)
        log.info("starting from %s, step %d, with its optimizer state", restore.path, start)
        if format == "huggingface":
            raise UserError(
                f"{restore.path} is a HuggingFace folder, which holds no optimizer state: leave "
                "out --gin.RESTORE_OPTIMIZER_STATE"
            )
        if format != "cosmo":
            args = restore.path, abstract.params, shardings.params, description
            _, params = checkpoints.restore_params(*args)
            opt_state = sources.restore_adafactor(
                restore.path, abstract.params, abstract.opt_state, shardings.opt_state, description
            )
            return TrainState(jax.device_put(np.int32(start), shardings.step), params, opt_state)
        with checkpoints.manager(model_dir, read_only=True) as source:
            return checkpoints.restore(source, start, wanted, description)
    fresh = jax.jit(lambda: init_state(model, step, seed), out_shardings=shardings)
    if not restore.path:
        log.info("starting from fresh parameters (seed %d)", seed)
        return fresh()
    start, params = checkpoints.restore_params(
        restore.path, abstract.params, shardings.params, description
    )
    log.info("starting from %s, step %d, with a fresh optimizer state", restore.path, start)
    if start == 0:
        log.info("its steps count from 0: TRAIN_STEPS is what this run trains, and no more")
    opt_state = jax.jit(step.transformation().init, out_shardings=shardings.opt_state)(params)
    count = jax.device_put(np.int32(start), shardings.step)
    return TrainState(count, params, opt_state)


def _report(pending: list[tuple[int, Sums]], saver) -> dict[str, float]:
    """Numbers of the steps since the last report; raises UserError if a loss is not finite."""
    window = jax.device_get(pending)
    for number, sums in window:
        if not math.isfinite(float(sums["loss"])) or not math.isfinite(float(sums["grad_norm"])):
            saver.wait_until_finished()
            kept = saver.latest_step()
            good = "no checkpoint was saved yet" if kept is None else f"step {kept} is kept"
            raise UserError(
                f"loss is {float(sums['loss'])} and the gradient's norm "
                f"{float(sums['grad_norm'])} at step {number}; stopped, {good} in "
                f"{saver.directory}. Try a lower learning rate (gin: BASE_LEARNING_RATE), "
                "max_grad_norm, or another RANDOM_SEED"
            )
    totals = metrics.total(sums for _, sums in window)
    newest = window[-1][1]
    return {
        **metrics.language_model(totals),
        "z_loss": totals["z_loss"] / max(totals["num_tokens"], 1.0),
        "grad_norm": float(newest["grad_norm"]),
        "learning_rate": float(newest["learning_rate"]),
    }


class _Evaluator:
    """Evaluates on demand; reads each validation set once and keeps it."""

    def __init__(self, config, model, vocabulary, mesh, seed):
        self.config, self.model, self.vocabulary = config, model, vocabulary
        self.mesh, self.seed = mesh, seed
        self.packed: dict[str, list[data.HostBatch]] | None = None
        self.tasks: list[data.EvalTask] | None = None

    def check(self) -> None:
        """Raise UserError if a validation set does not exist: at the start, not after hours."""
        for dataset in (self.config.packed, self.config.generated):
            if dataset is not None:
                data.check_split(dataset)

    def run(self, params, step: int) -> dict[str, float]:
        """Metrics by name, also logged, a line a task.

        "eval/TASK/..." is teacher-forced over the packed validation set, "infer_eval/TASK/..." is
        measured on its first `num_examples` examples one by one.
        """
        config = self.config
        results: dict[str, dict[str, dict[str, float]]] = {}
        if config.packed is not None:
            if self.packed is None:
                self.packed = data.eval_batches(
                    config.packed, num_batches=config.steps, **data.process_shard()
                )
            results["eval"] = evaluate.teacher_forced(self.model, params, self.packed, self.mesh)
        if config.generated is not None:
            if self.tasks is None:
                self.tasks = data.eval_tasks(config.generated, config.num_examples)
            session = infer.Session(
                self.model,
                params,
                self.vocabulary,
                self.mesh,
                config.generated.batch_size,
                config.generated.task_feature_lengths,
            )
            results["infer_eval"] = evaluate.judge(session, self.tasks, config.decoding, self.seed)
        sizes = {task.name: len(task.rows) for task in self.tasks or ()}
        for kind, tasks in results.items():
            for task, values in tasks.items():
                what = task if kind == "eval" else f"{task}, first {sizes[task]} examples"
                shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                log.info("step %d, %s, %s: %s", step, kind, what, shown)
        return {
            f"{kind}/{task}/{name}": value
            for kind, tasks in results.items()
            for task, values in tasks.items()
            for name, value in values.items()
        }
