"""Every gin file parses, and builds the model that its name promises."""

import math
import pathlib

import jax
import pytest

from cosmo.engine.base import config
from cosmo.engine.base.errors import UserError
from cosmo.engine.infer import infer
from cosmo.engine.model import models, optimizer, step
from cosmo.engine.train import early_stopping, reduce_on_plateau
from cosmo.engine.train.early_stopping import StoppingConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
VERBS = ("train", "eval", "infer", "cache")
REQUIRED = (
    "MODEL_DIR = '/nowhere'",
    "MIXTURE_OR_TASK_NAME = 'cosmo'",
    "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}",
    "VOCABULARY_PATH = 'tasks/sample/vocabulary.model'",
)
# Parameters of the published checkpoints: T5 1.1 as HuggingFace's model cards and T5X count them
# (embedding and logits separate), T5 1.0 large 737.7M.
PARAMETERS = {
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "t5_1_0_large": 737_668_096,
    "blenderbot_400m": 364_802_560,
    "blenderbot_1b": 1_437_393_920,
    "blenderbot_3b": 2_696_268_800,
}
MODELS = sorted((ROOT / "gin/models").glob("*_*.gin"))  # blenderbot.gin has no sizes
FOLDERS = ("cosmo", "canary", "prost")
EXPERIMENTS = sorted(path for name in FOLDERS for path in (ROOT / "gin" / name).glob("*.gin"))


def build(gin_file: pathlib.Path, verb: str, *bindings: str) -> models.EncoderDecoderModel:
    """The model that a gin file describes."""
    name = str(gin_file.relative_to(ROOT))
    config.load(f"gin/runs/{verb}.gin", [name], [*REQUIRED, "TRAIN_STEPS = 1", *bindings])
    return config.call(models.EncoderDecoderModel)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model_files_build_published_sizes(path):
    """Oracle: the published numbers of parameters."""
    shapes = models.abstract_params(build(path, "infer"))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == PARAMETERS.get(path.stem, count)
    assert path.stem in PARAMETERS or path.stem in ("t5_1_1_tiny", "blenderbot_tiny")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_load_for_every_verb(path, verb):
    """Property: one experiment file serves every verb."""
    further = ["INITIAL_CHECKPOINT_PATH = '/nowhere'"] if verb == "train" else []
    model = build(path, verb, *further)
    assert models.abstract_params(model)


@pytest.mark.parametrize(("name", "further"), [("cosmo_3b", 110_000), ("cosmo_11b", 130_000)])
def test_paper_recipes(name, further):
    """Oracle: Kim et al. 2023, section 4, and the step of the LM-adapted T5 1.1 checkpoints."""
    build(ROOT / f"gin/cosmo/{name}.gin", "train", "INITIAL_CHECKPOINT_PATH = '/nowhere'")
    config.load(
        "gin/runs/train.gin",
        [f"gin/cosmo/{name}.gin"],
        ["MODEL_DIR = '/nowhere'", "INITIAL_CHECKPOINT_PATH = '/nowhere'"],
    )
    assert config.query("TRAIN_STEPS") == 1_100_000 + further
    assert config.query("BATCH_SIZE") == 256
    assert config.query("BASE_LEARNING_RATE") == 1e-3
    assert config.query("LEARNING_RATE_FACTORS") == "constant"
    assert config.query("NARRATIVE_DROPOUT") == 0.3
    assert config.query("INSTRUCTION_DROPOUT") == 0.5
    assert "Adafactor" in str(config.query("OPTIMIZER"))


def test_a_recipe_may_ask_for_adam_and_early_stopping(tmp_path):
    """Oracle: by hand: Adam at 1e-5, patience 5; a recipe's file serves every verb."""
    path = tmp_path / "adam.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\nfrom cosmo.engine.model import optimizer\n"
        "include 'gin/cosmo/tiny.gin'\nOPTIMIZER = @optimizer.AdamW()\n"
        "BASE_LEARNING_RATE = 1e-5\nLEARNING_RATE_FACTORS = 'constant'\n"
        "EARLY_STOPPING_PATIENCE = 5\n"
    )
    for verb in VERBS:
        config.load(f"gin/runs/{verb}.gin", [str(path)], ["MODEL_DIR = 'x'"])
    config.load("gin/runs/train.gin", [str(path)], ["MODEL_DIR = 'x'"])
    found = config.call(step.StepConfig)
    assert found.optimizer == optimizer.AdamW(weight_decay=0.0)
    assert float(found.learning_rate(81_000)) == pytest.approx(1e-5)
    assert config.call(early_stopping.StoppingConfig) == StoppingConfig(
        5, "eval/all/perplexity", None, 0.0
    )


def test_a_recipe_may_train_as_parlai_does(tmp_path):
    """Oracle: by hand: AMSGrad, a warm-up from 1e-4, half the rate on a plateau."""
    path = tmp_path / "parlai.gin"
    path.write_text(
        "include 'gin/cosmo/tiny.gin'\ninclude 'gin/runs/adam.gin'\nAMSGRAD = True\n"
        "BASE_LEARNING_RATE = 1e-5\nLEARNING_RATE_FACTORS = 'constant * linear_warmup'\n"
        "WARMUP_STEPS = 100\nWARMUP_START = 1e-4\n"
        "PLATEAU_FACTOR = 0.5\nPLATEAU_PATIENCE = 2\nPLATEAU_MODE = 'min'\n"
    )
    for verb in VERBS:
        config.load(f"gin/runs/{verb}.gin", [str(path)], ["MODEL_DIR = 'x'"])
    config.load("gin/runs/train.gin", [str(path)], ["MODEL_DIR = 'x'"])
    found = config.call(step.StepConfig)
    assert found.optimizer == optimizer.AdamW(weight_decay=0.0, amsgrad=True)
    assert float(found.learning_rate(50)) == pytest.approx(1e-5 * (1e-4 + 0.9999 / 2))
    assert config.call(reduce_on_plateau.PlateauConfig) == reduce_on_plateau.PlateauConfig(
        0.5, 2, "eval/all/loss", "min", 1e-4, 0.0
    )


def test_canarys_paper_recipe():
    """Oracle: Kim et al. 2022, appendix B.1; 120,236 published exchanges, 4 of 7 examples."""
    further = ["MODEL_DIR = '/nowhere'", "INITIAL_CHECKPOINT_PATH = '/nowhere'"]
    config.load("gin/runs/train.gin", ["gin/canary/canary.gin"], further)
    assert config.call(step.StepConfig).optimizer == optimizer.AdamW(
        0.9, 0.999, 1e-8, weight_decay=0.0
    )
    assert config.query("BASE_LEARNING_RATE") == 1e-5
    assert config.query("BATCH_SIZE") == 24 and config.query("PACK") is False
    assert config.query("TRAIN_STEPS") == 81_000
    assert config.query("EARLY_STOPPING_PATIENCE") == 5
    assert config.query("EVAL_PERIOD") == round(120_236 * 7 / 4 / 24)
    shapes = models.abstract_params(config.call(models.EncoderDecoderModel))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 737_668_096
    config.load("gin/runs/train.gin", ["gin/canary/canary_adafactor.gin"], further)
    assert config.call(step.StepConfig).optimizer == optimizer.Adafactor()


def test_prosts_paper_recipes():
    """Oracle: Kim et al. 2022, appendix B.3; ParlAI's published command; published examples.

    Examples of ParlAI's teachers in training: 120,236, 76,052 (DailyDialog without openings),
    131,438, 74,092, 64,636, 27,018, and Topical-Chat's 188,378 utterances less 8,628 openings.
    """
    further = ["MODEL_DIR = '/nowhere'", "INITIAL_CHECKPOINT_PATH = '/nowhere'"]
    further += ["VOCABULARY_PATH = 'tasks/sample/vocabulary.model'"]
    examples = 120_236 + 76_052 + 131_438 + 74_092 + 64_636 + 27_018 + 188_378 - 8_628
    for name in ("prost", "prost_response_only", "prost_adafactor"):
        config.load("gin/runs/train.gin", [f"gin/prost/{name}.gin"], further)
        variant = "response_only" if name == "prost_response_only" else "rot_and_response"
        assert config.query("PROST_VARIANT") == variant
        assert config.query("MIXTURE_OR_TASK_NAME") == "prost"
        settings = config.call(step.StepConfig)
        adam = optimizer.AdamW(0.9, 0.999, 1e-8, weight_decay=0.0, amsgrad=True)
        adafactor = name == "prost_adafactor"
        assert settings.optimizer == (optimizer.Adafactor() if adafactor else adam)
        if not adafactor:
            rates = [float(settings.learning_rate(i)) for i in (0, 100, 150_000)]
            # 1e-9 at the start would be below the least rate of a schedule, T5X's.
            assert rates == pytest.approx([1e-8, 1e-5, 1e-5], rel=1e-5)
        assert settings.max_grad_norm == 0.1
        assert config.call(reduce_on_plateau.PlateauConfig) == reduce_on_plateau.PlateauConfig(
            0.5, 3, "eval/all/loss", "min", 1e-4, 0.0
        )
        assert config.call(StoppingConfig) == StoppingConfig(10, "eval/all/perplexity", None, 0.0)
        assert config.query("BATCH_SIZE") == 32 and config.query("PACK") is False
        assert config.query("TRAIN_STEPS") == 150_000
        assert config.query("EVAL_PERIOD") == pytest.approx(examples / 4 / 32, abs=5)
        assert config.query("TASK_FEATURE_LENGTHS") == {"inputs": 128, "targets": 128}
        model = config.call(models.EncoderDecoderModel)
        assert (model.z_loss, model.label_smoothing) == (0.0, 0.0)
        assert model.network.dropout_rate == 0.1 and model.network.forbidden_ids == (1,)
        shapes = models.abstract_params(model)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 2_696_268_800


@pytest.mark.parametrize("name", ["social_chemistry", "mic", "norm_bank"])
def test_canarys_pretraining_recipes(name):
    """Property: Canary's optimizer and batches, the task's own early stopping."""
    further = ["MODEL_DIR = '/nowhere'", "INITIAL_CHECKPOINT_PATH = '/nowhere'"]
    config.load("gin/runs/train.gin", [f"gin/canary/pretrain_{name}.gin"], further)
    assert config.query("MIXTURE_OR_TASK_NAME") == name
    assert config.query("EARLY_STOPPING_METRIC").split("/")[1].startswith(name)
    assert isinstance(config.call(step.StepConfig).optimizer, optimizer.AdamW)


@pytest.mark.parametrize(
    ("name", "rate", "epochs"),
    [("toxichat_stance", 5e-5, 16), ("toxichat_offense", 2e-5, 3), ("offense", 2e-5, 3)],
)
def test_toxichats_recipes(name, rate, epochs):
    """Oracle: the numbers of Baheti et al. 2021: batches of 32, 512 tokens, rates and epochs."""
    further = ["MODEL_DIR = '/nowhere'", "INITIAL_CHECKPOINT_PATH = '/nowhere'"]
    config.load("gin/runs/train.gin", [f"gin/canary/{name}.gin"], further)
    assert config.query("MIXTURE_OR_TASK_NAME") == name
    assert config.query("BATCH_SIZE") == 32
    assert config.query("TASK_FEATURE_LENGTHS")["inputs"] == 512
    assert config.query("BASE_LEARNING_RATE") == rate
    assert config.query("TRAIN_STEPS") == epochs * config.query("EVAL_PERIOD")
    # Of the mixture, ToxiChat's part counts: responses are what is judged.
    part = "toxichat_offense" if name == "offense" else name
    assert config.query("EARLY_STOPPING_METRIC").split("/")[1] == part


def test_the_recipe_of_goemotions():
    """Oracle: the numbers of Demszky et al. 2020: batches of 16, 4 epochs of 43,410, the rate."""
    further = ["MODEL_DIR = '/nowhere'", "INITIAL_CHECKPOINT_PATH = '/nowhere'"]
    config.load("gin/runs/train.gin", ["gin/canary/goemotions.gin"], further)
    assert config.query("MIXTURE_OR_TASK_NAME") == "goemotions"
    assert config.query("BASE_LEARNING_RATE") == 5e-5
    assert config.query("TRAIN_STEPS") == 4 * 43_410 // config.query("BATCH_SIZE")
    assert config.query("BATCH_SIZE") == 16


def test_another_architecture_overrides_the_network(tmp_path):
    """Property: a later file may bind MODEL, or the network alone; the sizes are still macros."""
    path = tmp_path / "other.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\nfrom cosmo.engine.model import models\n"
        "from cosmo.engine.model import t5\nMODEL = @other/models.EncoderDecoderModel()\n"
        "other/models.EncoderDecoderModel.network = @other/t5.T5Config()\n"
        "other/t5.T5Config.mlp_dim = 7\n"
    )
    config.load("gin/runs/infer.gin", ["gin/cosmo/tiny.gin", str(path)], ["MODEL_DIR = 'x'"])
    network = config.call(infer.SessionConfig).model.network
    assert (network.mlp_dim, network.emb_dim) == (7, config.query("EMB_DIM"))


def test_a_model_file_after_an_experiment_wins():
    """Oracle: gin's rule that the last word wins; tools/bench.py gives files in this order."""
    model = build(ROOT / "gin/cosmo/tiny.gin", "train")
    config.load(
        "gin/runs/train.gin",
        ["gin/cosmo/tiny.gin", "gin/models/t5_1_1_small.gin"],
        ["MODEL_DIR = 'x'"],
    )
    small = config.call(models.EncoderDecoderModel).network
    assert (small.vocab_size, small.emb_dim, small.num_heads) == (32128, 512, 6)
    assert model.network.emb_dim != small.emb_dim
    assert small.dtype == "float32"  # tiny's, which a model file leaves alone


def test_a_missing_model_is_named():
    """The sizes have no default: the message names them and the file that needs them."""
    with pytest.raises(UserError, match=r"EMB_DIM.* must be given \(gin/runs/train.gin needs it\)"):
        config.load("gin/runs/train.gin", [], [*REQUIRED, "TRAIN_STEPS = 1"])


def test_a_parameter_set_itself_needs_no_macro():
    """A run's config.gin holds what was in use: sizes that were set as parameters have no macro."""
    sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim")
    sizes += ("num_encoder_layers", "num_decoder_layers")
    given = [f"t5.T5Config.{name} = 16" for name in sizes]
    config.load("gin/runs/infer.gin", [], [*REQUIRED, *given])
    assert config.call(models.EncoderDecoderModel).network.emb_dim == 16


def test_runs_share_their_macros_with_t5x():
    """Oracle: the macro names of T5X's run files that people pass on the command line."""
    files = ("runs/train", "defaults/common", "defaults/train")
    text = "".join((ROOT / f"gin/{file}.gin").read_text() for file in files)
    for name in (  # noqa: SIM905
        "MODEL_DIR MIXTURE_OR_TASK_NAME MIXTURE_OR_TASK_MODULE TASK_FEATURE_LENGTHS TRAIN_STEPS "
        "BATCH_SIZE DROPOUT_RATE USE_CACHED_TASKS EVAL_STEPS EVAL_PERIOD RANDOM_SEED "
        "INITIAL_CHECKPOINT_PATH LOSS_NORMALIZING_FACTOR EVALUATOR_NUM_EXAMPLES"
    ).split():
        assert f"\n{name} = " in text, name
