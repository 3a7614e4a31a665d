"""The recipes on upstream T5X, as far as that can be seen without it: see t5x_driver.py."""

import ast
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import gin
from cosmo.engine.base import config
from cosmo.engine.checkpoints import run_checkpoints
from cosmo.engine.data import datasets
from cosmo.engine.model import models, optimizer, partitioning, step
from cosmo.engine.train import evaluate
from cosmo.tasks import mixtures

ROOT = pathlib.Path(__file__).resolve().parents[1]
T5X_FILES = sorted((ROOT / "gin/t5x").rglob("*.gin"))
# This engine's experiment file -> T5X's for training, and the one that its eval and infer take.
EXPERIMENTS = {
    "cosmo/tiny": ("cosmo_tiny", "cosmo/tiny"),
    "cosmo/cosmo_3b": ("cosmo_3b", "cosmo/cosmo_3b"),
    "cosmo/cosmo_11b": ("cosmo_11b", "cosmo/cosmo_11b"),
    "canary/canary_tiny": ("canary_tiny", "canary/canary_tiny"),
    "canary/canary": ("canary", "canary/full"),
    "canary/canary_adafactor": ("canary_adafactor", "canary/canary_adafactor"),
}
TRAIN = ['MODEL_DIR = "/run"', 'INITIAL_CHECKPOINT_PATH = "/start/checkpoint_7"']
EVAL = ['CHECKPOINT_PATH = "/run/checkpoint_9"', 'EVAL_OUTPUT_DIR = "/out"']
INFER = ['CHECKPOINT_PATH = "/run/checkpoint_9"', 'INFER_OUTPUT_DIR = "/out"']
NOTHING_TRAINED = "INITIAL_CHECKPOINT_PATH = None"

# Macros that T5X has no use for, and why.
NOT_USED = {
    "CACHE_PATH": "the cache of packed rows is this engine's format",
    "SCAN_LAYERS": "t5x.examples.t5 does not scan its layers",
    "REMAT_POLICY": "t5x.examples.t5 does not rematerialize",
    "ATTENTION": "t5x.examples.t5 has plain attention alone",
    "MIXTURE_OR_TASK_MODULE": "deprecated there: import the module in a gin file",
    "NUM_SAMPLES": "T5X keeps one answer",
    "BEAM_SIZE": "decode_fn is bound to temperature_sample",
    "LENGTH_PENALTY": "decode_fn is bound to temperature_sample",
    "BEAM_SEARCH": "decode_fn is bound to temperature_sample",
    "BEAM_EARLY_STOPPING": "decode_fn is bound to temperature_sample",
    "MIN_LENGTH": "T5X's decoding has no such limit",
    "BLOCK_NGRAM": "T5X's decoding has no such limit",
    "CONTEXT_BLOCK_NGRAM": "T5X's decoding has no such limit",
    "BANNED_IDS": "T5X's decoding has no such limit",
    "INITIAL_CHECKPOINT_STEP": "for `plan`, which T5X has not",
    "CHAT_TEMPERATURE": "T5X has no chat",
    "CHAT_TOP_P": "T5X has no chat",
    "FORCED_EOS": "T5X's decoding has no such setting",
    "SAVE_TIMEOUT": "T5X has no such setting",
    "BAD_STEP_POLICY": "T5X has no such setting",
    "SPIKE_FACTOR": "T5X has no such setting",
    "MAX_BAD_STEPS": "T5X has no such setting",
    "EARLY_STOPPING_PATIENCE": "T5X has no such setting",
    "EARLY_STOPPING_METRIC": "T5X has no such setting",
    "EARLY_STOPPING_MODE": "T5X has no such setting",
    "EARLY_STOPPING_MIN_DELTA": "T5X has no such setting",
    "WARMUP_START": "T5X's warm-up starts at 0",
    "PLATEAU_FACTOR": "T5X has no such setting",
    "PLATEAU_PATIENCE": "T5X has no such setting",
    "PLATEAU_METRIC": "T5X has no such setting",
    "PLATEAU_MODE": "T5X has no such setting",
    "PLATEAU_THRESHOLD": "T5X has no such setting",
    "PLATEAU_MIN_RATE": "T5X has no such setting",
    "TRACKER": "T5X has no such setting",
    "TRACKER_PROJECT": "T5X has no such setting",
}


def read(script: str, *files: str, bindings: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "tests/t5x_driver.py", script, *files, "--", *bindings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def built(script: str, *files: str, bindings: list[str]) -> dict:
    """What the script's function is called with, references built."""
    done = read(script, *files, bindings=bindings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def given(record: dict, *names: str) -> list:
    return [record[name] for name in names]


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.fixture(params=EXPERIMENTS)
def experiment(request) -> str:
    """An experiment's name; this engine has read it for training."""
    further = ["MODEL_DIR = '/run'", "INITIAL_CHECKPOINT_PATH = '/start/checkpoint_7'"]
    config.load("gin/runs/train.gin", [f"gin/{request.param}.gin"], further)
    return request.param


def test_train_gets_the_values_of_this_engine(experiment):
    """Oracle: the settings that this engine builds from the same experiment file.

    That T5X's files parse, name real parameters and leave out none that is required is checked on
    the way: gin and the stubs, which have upstream's signatures, raise otherwise.
    """
    theirs = built("train", f"gin/t5x/{EXPERIMENTS[experiment][0]}.gin", bindings=TRAIN)
    model = config.call(models.EncoderDecoderModel)
    assert isinstance(model, models.EncoderDecoderModel)
    network = theirs["model"]["module"]["config"]
    assert len(network) == 12  # with the name of what was called
    for name in set(network) - {"called"}:
        assert network[name] == as_json(getattr(model.network, name)), name
    for name in ("z_loss", "label_smoothing", "loss_normalizing_factor"):
        assert theirs["model"][name] == getattr(model, name)

    evaluation = config.call(evaluate.EvalConfig)
    with gin.config_scope("train"):
        train = config.call(datasets.DatasetConfig)
    names = ("split", "batch_size", "shuffle", "seed", "use_cached", "pack")
    names += ("task_feature_lengths",)
    for key, ours in (
        ("train_dataset_cfg", train),
        ("train_eval_dataset_cfg", evaluation.packed),
        ("infer_eval_dataset_cfg", evaluation.generated),
    ):
        assert given(theirs[key], *names) == [getattr(ours, name) for name in names]
        task = dict(theirs[key]["mixture_or_task_name"])
        assert task.pop("called") == "cosmo.tasks.mixtures.use"
        assert task.pop("token_metrics") is False
        separators = task.pop("separators")
        bound = gin.get_bindings(mixtures.use)
        assert separators == vars(bound.pop("separators"))
        for corpora in ("canary", "prost"):
            assert task.pop(corpora) == vars(bound.pop(corpora))
        assert task == as_json(bound)

    assert theirs["eval_period"] == evaluation.period
    assert theirs["eval_steps"] == evaluation.steps
    assert theirs["inference_evaluator_cls"]["num_examples"] == evaluation.num_examples
    assert theirs["run_eval_before_training"] == evaluation.run_before_training
    ours, theirs_decoding = evaluation.decoding, theirs["model"]["decode_fn"]
    assert given(theirs_decoding, "temperature", "topk", "topp", "max_decode_steps") == [
        ours.temperature,
        ours.top_k,
        ours.top_p,
        ours.max_new_tokens,
    ]

    settings = config.call(step.StepConfig)
    assert theirs["trainer_cls"]["num_microbatches"] == settings.num_microbatches
    schedule = dict(theirs["trainer_cls"]["learning_rate_fn"])
    assert schedule.pop("called") == "t5x.utils.create_learning_rate_scheduler"
    assert len(schedule) == 3
    for name, value in schedule.items():
        assert value == getattr(settings.learning_rate, name)
    theirs_optimizer = theirs["model"]["optimizer_def"]
    if theirs_optimizer["called"] == "t5x.optimizers.adam":
        assert settings.optimizer == optimizer.AdamW(weight_decay=0.0)
        assert theirs_optimizer["learning_rate"] == settings.learning_rate.base_learning_rate
        assert settings.learning_rate.names == ["constant"]
        assert settings.max_grad_norm is None
        # T5X asks for both, or refuses a checkpoint with another optimizer's state.
        restore = theirs["checkpoint_cfg"]["restore"]
        assert restore["fallback_to_scratch"] is True
        ((pattern, taken_from),) = restore["assignment_map"]
        assert re.fullmatch(pattern, "state/param_states/0/mu/decoder/decoder_norm/scale")
        assert not re.fullmatch(pattern, "target/decoder/decoder_norm/scale")
        assert taken_from is None
    else:
        assert settings.optimizer == optimizer.Adafactor()
        assert theirs_optimizer["global_norm_clip_threshold"] == settings.max_grad_norm
    # Left open, ours chooses; T5X must be told, and is told 1.
    assert config.call(partitioning.Partitioner).num_partitions is None
    assert theirs["partitioner"]["num_partitions"] == 1

    saving = config.call(run_checkpoints.CheckpointConfig)
    assert given(theirs["checkpoint_cfg"]["save"], "period", "keep") == [
        saving.save_period,
        saving.keep,
    ]
    assert theirs["checkpoint_cfg"]["restore"]["path"] == saving.restore.path
    for key, name in (
        ("total_steps", "TRAIN_STEPS"),
        ("stats_period", "STATS_PERIOD"),
        ("random_seed", "RANDOM_SEED"),
        ("model_dir", "MODEL_DIR"),
    ):
        assert theirs[key] == config.query(name)


@pytest.mark.parametrize("experiment_file", EXPERIMENTS)
def test_eval_and_infer_get_the_values_of_this_engine(experiment_file):
    """Oracle: the settings that this engine builds from the same experiment file."""
    shared = f"gin/{EXPERIMENTS[experiment_file][1]}.gin"
    for script, verb, bindings in (("evaluate", "eval", EVAL), ("infer", "infer", INFER)):
        run_file = f"gin/t5x/runs/{verb}.gin"
        theirs = built(script, run_file, shared, bindings=[*bindings, NOTHING_TRAINED])
        config.load(f"gin/runs/{verb}.gin", [shared], ["MODEL_DIR = '/run'"])
        with gin.config_scope(verb):
            ours = config.call(datasets.DatasetConfig)
        for name in ("split", "batch_size", "shuffle", "pack", "task_feature_lengths"):
            assert theirs["dataset_cfg"][name] == getattr(ours, name)
        assert theirs["output_dir"] == "/out"
        restore = theirs["restore_checkpoint_cfg"]
        assert given(restore, "path", "mode") == ["/run/checkpoint_9", "specific"]
        vocabulary = theirs["model"]["input_vocabulary"]
        assert vocabulary == theirs["model"]["output_vocabulary"]
        assert vocabulary["path"] == config.query("VOCABULARY_PATH")
        if verb == "infer":
            assert theirs["mode"] == config.query("MODE")
            assert theirs["checkpoint_ds_iter"] is False
        else:
            count = config.query("EVAL_NUM_EXAMPLES")
            assert theirs["inference_evaluator_cls"]["num_examples"] == count


@pytest.mark.parametrize("name", sorted(train for train, _ in EXPERIMENTS.values()))
def test_train_takes_no_none_for_eval_steps(name):
    """Oracle: t5x/utils.py multiplies EVAL_STEPS by the batch size; decoding is bounded by targets.

    `temperature_sample` raises for more steps than the targets have positions.
    """
    theirs = built("train", f"gin/t5x/{name}.gin", bindings=TRAIN)
    assert isinstance(theirs["eval_steps"], int)
    steps = theirs["model"]["decode_fn"]["max_decode_steps"]
    assert steps <= theirs["infer_eval_dataset_cfg"]["task_feature_lengths"]["targets"]
    # T5X refuses periods of which neither divides the other.
    periods = sorted([theirs["eval_period"], theirs["checkpoint_cfg"]["save"]["period"]])
    assert periods[1] % periods[0] == 0


def test_documented_commands_and_overrides_load():
    """Oracle: docs/t5x.md, its commands run with all the overrides that its text names."""
    text = (ROOT / "docs/t5x.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^python -m t5x\.(\w+) (.+)$", text, re.M)
    assert [name for name, _ in commands] == ["train", "eval", "infer"]
    section = text
    overrides = re.findall(r"`--gin\.([\w./]+)=(\w+)`", section)
    assert len(overrides) == 3
    for name, arguments in commands:
        words = shlex.split(arguments)
        files = [w.removeprefix("--gin_file=") for w in words if w.startswith("--gin_file=")]
        bindings = [w.removeprefix("--gin.") for w in words if w.startswith("--gin.")]
        if name == "train":
            bindings += [f"{key} = {value}" for key, value in overrides]
        record = built({"eval": "evaluate"}.get(name, name), *files, bindings=bindings)
    assert record["output_dir"] == "/tmp/x/inferences"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("network.T5Config.embdim = 3", "embdim"),
        ("MODEL_DIR = %gin.REQUIRED", "not subsequently overridden"),
        ("models.EncoderDecoderModel.module = %NOWHERE", "NOWHERE"),
    ],
)
def test_the_stubs_refuse_what_t5x_refuses(wrong, said):
    """Oracle: gin's own errors; without them the tests above would prove nothing."""
    done = read("train", "gin/t5x/cosmo_tiny.gin", bindings=[*TRAIN, wrong])
    assert done.returncode != 0
    assert said in done.stderr


def test_a_required_parameter_left_out_is_an_error(tmp_path):
    """Oracle: upstream's `train` has no default for `model_dir`."""
    text = (ROOT / "gin/t5x/runs/train.gin").read_text()
    (tmp_path / "train.gin").write_text(text.replace("  model_dir = %MODEL_DIR\n", ""))
    shared = "gin/cosmo/tiny.gin"
    done = read("train", str(tmp_path / "train.gin"), shared, bindings=TRAIN)
    assert done.returncode != 0
    assert "model_dir" in done.stderr


@pytest.mark.parametrize("name", ["shard_id", "output_dir"])
def test_infer_binds_what_its_script_asks_gin_for(tmp_path, name):
    """Oracle: t5x/infer.py queries these by name; a default in its signature is no value."""
    text = (ROOT / "gin/t5x/runs/infer.gin").read_text()
    (tmp_path / "infer.gin").write_text(re.sub(rf"^  {name} = .*\n", "", text, flags=re.M))
    done = read("infer", str(tmp_path / "infer.gin"), "gin/cosmo/tiny.gin", bindings=INFER)
    assert done.returncode != 0
    assert f"Configurable 'infer' has no value bound for parameter '{name}'" in done.stderr
    whole = read("infer", "gin/t5x/runs/infer.gin", "gin/cosmo/tiny.gin", bindings=INFER)
    assert whole.returncode == 0, whole.stderr


def references(paths) -> set[str]:
    text = "".join(re.sub(r"#.*", "", path.read_text()) for path in paths)
    return set(re.findall(r"%([A-Z_]+)", text))


def test_every_macro_is_used_or_excused():
    """Property: NOT_USED lists all macros that T5X ignores, and none that it reads."""
    folders = ("defaults", "models", "cosmo", "canary")
    shared = [path for name in folders for path in (ROOT / "gin" / name).glob("*.gin")]
    shared = [path for path in shared if "blenderbot" not in path.stem]  # T5X has no such network
    shared.append(ROOT / "gin/runs/finetune.gin")
    text = "".join(path.read_text() for path in shared)
    macros = set(re.findall(r"^([A-Z][A-Z_]*) = ", text, re.M))
    used = references([*T5X_FILES, *shared, ROOT / "gin/runs/tasks.gin"])
    assert macros - used == set(NOT_USED)
    said = (ROOT / "docs/t5x.md").read_text()
    assert all(f"`{name}`" in said for name in NOT_USED)


def test_no_number_stands_in_t5x_files():
    """Property: their numbers are macros of gin/defaults, gin/models and gin/cosmo.

    The exceptions are T5X's alone, what it cannot leave open, a seed that nothing depends on
    (evaluation draws nothing), or a rule for names, which holds no number.
    """
    numbers = set()
    for path in T5X_FILES:
        for line in re.sub(r"#.*", "", path.read_text()).splitlines():
            name, _, value = (part.strip() for part in line.partition(" = "))
            if value and not value.startswith(("@", "%", "[@")):
                literal = ast.literal_eval(value)
                if not isinstance(literal, bool | str | None):
                    numbers.add((name, literal))
    assert numbers == {
        ("seed", 0),
        ("shard_id", 0),
        ("num_shards", 1),
        ("INFER_FLUSH_PERIOD", 100),
        ("NUM_PARTITIONS", 1),
        ("assignment_map", (("state/param_states/.*", None),)),
    }
