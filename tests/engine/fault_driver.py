"""A training run in a process of its own, for tests that kill it, starve it or spoil its numbers.

    python -m tests.engine.fault_driver MODEL_DIR '{"total_steps": 30, ...}'

Everything is `train.train`'s own but the data: batches of random tokens, each a function of its
index, which is its position. The options are those of OPTIONS.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np

OPTIONS = {
    "total_steps": 30,
    "save_period": 5,
    "stats_period": 4,
    "eval_period": None,
    "run_before_training": False,  # an evaluation
    "keep": 3,
    "save_timeout": 60,
    "policy": "stop",
    "spike_factor": None,
    "max_in_a_row": 3,
    "rows": True,  # whether batches name their rows
    "pause": 0.0,  # seconds that a batch takes to read, so that a kill can land between steps
    "bad": [],  # steps whose loss weights are infinite
    "spikes": [],  # steps whose loss weights are a hundredfold
    "slow_evaluation": 0.0,  # seconds
    "perplexity": {},  # what evaluations find: {step, as JSON writes it: value}
    "patience": None,
    "plateau": {},  # fields of reduce_on_plateau.PlateauConfig
    "sleeps": None,  # [process, "save" or "write"]: sleeps there instead
    "clock": 0.0,  # seconds by which the system's clock is wrong
    "fail_write": None,  # the step whose background write fails
}
ROWS, SOURCE, TARGET = 8, 12, 8


def batch(index: int, options: dict):
    """The batch of step `index` + 1 [8, 12] and [8, 8]: token ids in 2..39."""
    from cosmo.engine.data import datasets

    rng = np.random.default_rng([index, 5])
    targets = rng.integers(2, 40, (ROWS, TARGET)).astype(np.int32)
    weights = np.ones((ROWS, TARGET), np.float32)
    if index + 1 in options["bad"]:
        weights[:] = np.inf
    if index + 1 in options["spikes"]:
        weights[:] = 100.0
    arrays = {
        "encoder_input_tokens": rng.integers(2, 40, (ROWS, SOURCE)).astype(np.int32),
        "encoder_segment_ids": np.ones((ROWS, SOURCE), np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_segment_ids": np.ones((ROWS, TARGET), np.int32),
        "decoder_loss_weights": weights,
    }
    rows = np.arange(index * ROWS, (index + 1) * ROWS) if options["rows"] else None
    return datasets.TrainBatch(arrays, index + 1, rows)


class Words:
    """A vocabulary whose texts are the ids themselves."""

    path, size, fingerprint, eos_id = "words", 40, "0", 1


def settings(model_dir: str, options: dict) -> dict:
    """Keyword arguments of `train.train`."""
    import jax

    from cosmo.engine.checkpoints import run_checkpoints
    from cosmo.engine.data import datasets
    from cosmo.engine.model import models, partitioning, step
    from cosmo.engine.model.optimizer import Adafactor, LearningRateSchedule
    from cosmo.engine.train import bad_steps, early_stopping, evaluate, reduce_on_plateau
    from tests.engine import tiny_network

    network = tiny_network.config(num_decoder_layers=2, dropout_rate=0.1)
    lengths = {"inputs": SOURCE, "targets": TARGET}
    rows = ROWS * jax.process_count()
    dataset = datasets.DatasetConfig("none", lengths, batch_size=rows)
    evaluation = None
    if options["eval_period"]:
        evaluation = evaluate.EvalConfig(
            period=options["eval_period"],
            packed=dataset,
            run_before_training=options["run_before_training"],
        )
    return dict(
        model=models.EncoderDecoderModel(network, loss_normalizing_factor=None),
        vocabulary=Words(),
        dataset=dataset,
        model_dir=model_dir,
        total_steps=options["total_steps"],
        step=step.StepConfig(
            optimizer=Adafactor(min_dim_size_to_factor=8),
            learning_rate=LearningRateSchedule(
                "constant * linear_warmup", base_learning_rate=0.01, warmup_steps=20
            ),
        ),
        evaluation=evaluation,
        checkpoint=run_checkpoints.CheckpointConfig(
            options["save_period"], options["keep"], save_timeout=options["save_timeout"]
        ),
        partitioner=partitioning.Partitioner(),
        bad_steps=bad_steps.BadStepConfig(
            options["policy"], options["spike_factor"], options["max_in_a_row"]
        ),
        early_stop=early_stopping.StoppingConfig(options["patience"]),
        plateau=reduce_on_plateau.PlateauConfig(**options["plateau"]),
        stats_period=options["stats_period"],
    )


def patch(options: dict, put=setattr) -> None:
    """Replace the data, and put the faults in their places, by `put(object, name, value)`."""
    import jax

    from cosmo.engine.checkpoints import integrity, run_checkpoints
    from cosmo.engine.data import datasets, reader
    from cosmo.engine.train import evaluate

    def train_batches(config, *, start_step, position, shard=0, num_shards=1, **_):
        index = position or 0
        assert index == start_step, "the data goes on where the steps do"
        while True:
            time.sleep(options["pause"])
            # Each process has its own rows.
            yield batch(index * num_shards + shard, options)._replace(position=index + 1)
            index += 1

    put(reader, "train_batches", train_batches)
    abstract = datasets.abstract_batch

    def abstract_batch(config):  # weights are float32 here, to be made infinite
        name = "decoder_loss_weights"
        shapes = abstract(config)
        return {**shapes, name: jax.ShapeDtypeStruct(shapes[name].shape, np.float32)}

    put(datasets, "abstract_batch", abstract_batch)
    put(reader, "start", lambda: None)
    put(reader, "check_split", lambda dataset: None)

    def teacher_forced(model, params, packed, layout):
        time.sleep(options["slow_evaluation"])
        first = jax.tree.leaves(params)[0]
        return {"task": {"sum": float(np.sum(np.asarray(first, np.float64)))}}

    put(evaluate, "teacher_forced", teacher_forced)
    if options["perplexity"]:
        run = evaluate.Evaluator.run

        def found(evaluator, params, step):
            values = {"eval/all/perplexity": options["perplexity"][str(step)]}
            return {**run(evaluator, params, step), **values}

        put(evaluate.Evaluator, "run", found)
    put(reader, "eval_batches", lambda *args, **rest: [])

    if options["clock"]:
        now, now_ns = time.time, time.time_ns
        put(time, "time", lambda: now() + options["clock"])
        put(time, "time_ns", lambda: now_ns() + int(1e9 * options["clock"]))
    if options["sleeps"] and options["sleeps"][0] == jax.process_index():
        if options["sleeps"][1] == "save":
            from cosmo.engine.checkpoints import checkpoint_writer

            put(checkpoint_writer.CheckpointWriter, "save", lambda *args: time.sleep(1000))
        else:
            put(integrity, "write_manifest", lambda *args: time.sleep(1000))
    if options["fail_write"] is not None:
        write, start = integrity.write_manifest, run_checkpoints.start_saving
        steps = []

        def starting(manager, step, *rest):
            steps.append(step)
            start(manager, step, *rest)

        def failing(*args):
            if steps[-1] == options["fail_write"]:
                raise OSError(5, "Input/output error")
            write(*args)

        put(run_checkpoints, "start_saving", starting)
        put(integrity, "write_manifest", failing)


def main() -> int:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    model_dir, options = sys.argv[1], {**OPTIONS, **json.loads(sys.argv[2])}
    from cosmo.engine.base import command_line
    from cosmo.engine.train import train

    command_line.set_up_logging(False)
    command_line.set_up_jax("JAX_NUM_PROCESSES" in os.environ)
    patch(options)

    def run() -> None:
        state = train.train(**settings(model_dir, options))
        print(f"done: step {int(state.step)}")

    return command_line.guarded(run)


if __name__ == "__main__":
    sys.exit(main())
