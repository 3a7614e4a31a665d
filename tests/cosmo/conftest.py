"""One small training run, made by the command line, that the tests of all verbs share."""

import shutil

import pytest

from cosmo.__main__ import main

SMALL = (
    "--gin_file=gin/cosmo/tiny.gin",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}",
    "--gin.BATCH_SIZE=8",
    "--gin.NUM_ENCODER_LAYERS=1",
    "--gin.NUM_DECODER_LAYERS=1",
    "--gin.t5.T5Config.emb_dim=32",
    "--gin.t5.T5Config.mlp_dim=32",
    "--gin.t5.T5Config.num_heads=2",
    "--gin.t5.T5Config.head_dim=16",
    "--gin.EVAL_PERIOD=4",
    "--gin.EVAL_STEPS=1",
    "--gin.EVALUATOR_NUM_EXAMPLES=3",
    "--gin.MAX_NEW_TOKENS=8",
    "--gin.STATS_PERIOD=2",
    "--gin.SHUFFLE_BUFFER_SIZE=100",
    "--gin.WARMUP_STEPS=1",
    "--gin.BASE_LEARNING_RATE=0.05",
)


@pytest.fixture(scope="session")
def small():
    """Arguments of a run that takes seconds."""
    return SMALL


@pytest.fixture(scope="session")
def trained(made_once, tmp_path_factory):
    """A MODEL_DIR trained for 8 steps."""

    def train(folder):
        run = f"--gin.MODEL_DIR={folder}"
        assert main(["train", *SMALL, run, "--gin.TRAIN_STEPS=8", "--quiet"]) == 0

    # A copy for each worker process: some tests add metrics to it.
    made = made_once("trained", train)
    return shutil.copytree(made, tmp_path_factory.mktemp("run"), dirs_exist_ok=True)
