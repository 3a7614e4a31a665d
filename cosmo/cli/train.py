"""`python -m cosmo train`: train, or continue a run."""

import argparse

from cosmo.cli import settings
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError

# Macros that the rows of a cache depend on, beside lengths and vocabulary: the engine, which has
# no task's name, compares those.
CACHED = (
    "MIXTURE_OR_TASK_NAME",
    "MIXTURE_RATES",
    "NARRATIVE_DROPOUT",
    "INSTRUCTION_DROPOUT",
    "SEPARATOR",
    "TURN_SEPARATOR",
)


def run(args: argparse.Namespace) -> None:
    """Train, and print how the run ended; every setting comes from gin."""
    from cosmo.engine.base import config
    from cosmo.engine.train import early_stopping, train

    # First: it needs no corpus, and refuses hours on the wrong rows.
    check_cache()
    evaluates = config.query("EVAL_PERIOD") is not None
    reads = config.query("CACHE_PATH") is None
    # A run from a cache reads no training split, and one without evaluation no validation split.
    settings.check_tasks(*["train"] * reads, *["validation"] * evaluates)
    state = config.call(train.train)
    step, folder = int(state.step), config.query("MODEL_DIR")
    stopping = config.call(early_stopping.StoppingConfig)
    if early_stopping.is_over(stopping, early_stopping.read_history(stopping, folder, step)):
        print(f"done: stopped early at step {step} in {folder}")
    elif step < int(config.query("TRAIN_STEPS")):
        print(f"stopped by SIGTERM: step {step} is saved in {folder}; the same command continues")
    else:
        print(f"done: step {step} in {folder}")


def check_cache() -> None:
    """Raise UserError if CACHE_PATH was written with other settings than this run has."""
    from cosmo.engine.base import config, saved_settings
    from cosmo.engine.data import cache_reading

    path = config.query("CACHE_PATH")
    if path is None:
        return
    recipe = cache_reading.Cache(path).manifest["settings"]["recipe"]
    theirs = saved_settings.macros_in("\n".join(recipe))
    for name in CACHED:
        # A cache of an older version may lack a macro.
        if name in theirs and theirs[name] != config.query(name):
            raise UserError(
                f"the cache {path} was written with {name}={theirs[name]!r}, this run has "
                f"{config.query(name)!r}: give --gin.{name} as it was, or another CACHE_PATH"
            )


VERB = Verb(
    help="train, or continue from the latest checkpoint in MODEL_DIR",
    description="Train a model, or continue from the latest checkpoint in MODEL_DIR. MODEL_DIR "
    "then holds checkpoints, metrics.jsonl, TensorBoard files, config.gin and settings.json.",
    examples="""\
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run \\
    --gin.TRAIN_STEPS=1200 --gin.BATCH_SIZE=32 --gin.DROPOUT_RATE=0.1
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run2 \\
    --gin.CACHE_PATH=/tmp/rows
""",
    run=run,
    gin_file="gin/runs/train.gin",
)
