"""`python -m cosmo eval`: measure a checkpoint on validation data."""

import argparse

from cosmo.cli import settings
from cosmo.engine.base.command_line import Verb


def run(args: argparse.Namespace) -> None:
    """Evaluate a checkpoint; every setting comes from gin."""
    from cosmo.engine.base import config
    from cosmo.engine.train import evaluate

    # First, because restoring a model takes minutes.
    settings.check_tasks(config.query("EVAL_SPLIT"))
    config.call(evaluate.evaluate)


VERB = Verb(
    help="measure a checkpoint on validation data",
    description="Measure a checkpoint on every task of its mixture: prints a table, writes "
    "metrics.json and the answers (to eval/ in the run's folder, or EVAL_OUTPUT_DIR).",
    examples="""\
  python -m cosmo eval --gin.MODEL_DIR=/tmp/run
  python -m cosmo eval --gin.MODEL_DIR=/tmp/run --gin.EVAL_SPLIT=test \\
    --gin.EVAL_NUM_EXAMPLES=100 --gin.CHECKPOINT_PATH=/tmp/run/checkpoints/60
""",
    run=run,
    gin_file="gin/runs/eval.gin",
    saved_settings=True,
)
