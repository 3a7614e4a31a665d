"""The settings of a run are data: they come back as they were, and nothing in a folder is run."""

import json
import shutil
import sys

import pytest

import cosmo
from cosmo.__main__ import main
from cosmo.cli import settings
from cosmo.engine.base import config, saved_settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.model import blenderbot, models, t5

TINY = "gin/cosmo/tiny.gin"
GIVEN = (
    "MODEL_DIR = '/nowhere'",
    "BATCH_SIZE = 24",
    "MLP_ACTIVATIONS = ('relu',)",
    "MIXTURE_RATES = {'soda': 2.0}",
    "t5.T5Config.emb_dim = 48",
    "MINE = 40",
    "t5.T5Config.mlp_dim = %MINE",
)


def settings_of(*bindings: str) -> dict:
    """The content of settings.json of a training run with these overrides."""
    config.load("gin/runs/train.gin", [TINY], [*GIVEN, *bindings])
    return json.loads(config.run_files()[saved_settings.FILE])


def saved(folder, content) -> saved_settings.Saved:
    """What is read back of a settings.json."""
    (folder / saved_settings.FILE).write_text(json.dumps(content))
    return saved_settings.read(folder)


def test_a_run_is_read_back_as_it_was(tmp_path):
    """Oracle: the same file and overrides given to the other verb."""
    found = saved(tmp_path, settings_of())
    assert found.parameters == {"t5.T5Config.emb_dim": 48, "t5.T5Config.mlp_dim": 40}
    assert "MINE" not in found.macros
    here = ("MODEL_DIR = '/elsewhere'",)
    config.load("gin/runs/infer.gin", [], here, saved=found)
    names = config.macros_of("gin/runs/infer.gin") - {"MODEL", "CHECKPOINT_PATH"}
    ours, network = {name: config.query(name) for name in names}, config.call(t5.T5Config)
    config.load("gin/runs/infer.gin", [TINY], [*GIVEN[3:], *GIVEN[2:3], *here])
    theirs = {name: config.query(name) for name in names}
    assert ours == theirs
    assert network == config.call(t5.T5Config)
    assert network.mlp_activations == ("relu",)  # a tuple again: settings are hashed


def test_macros_that_follow_others_are_resolved(tmp_path):
    """Oracle: by hand: EVAL_BATCH_SIZE is BATCH_SIZE while training."""
    found = saved(tmp_path, settings_of())
    config.load("gin/runs/eval.gin", [], ["MODEL_DIR = 'x'"], saved=found)
    assert config.query("EVAL_BATCH_SIZE") == 24


def test_what_the_command_line_says_wins(tmp_path):
    """Property: run file < the run's settings < command line."""
    found = saved(tmp_path, settings_of())
    config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'", "EMB_DIM = 7"], saved=found)
    assert config.query("EMB_DIM") == 7


def test_where_to_write_is_never_taken_from_a_folder(tmp_path):
    """Property: a folder of somebody else's cannot choose output folders or other checkpoints."""
    content = settings_of()
    names = ("MODEL_DIR", "CHECKPOINT_PATH", "INFER_OUTPUT_DIR", "MIXTURE_OR_TASK_MODULE")
    content["macros"].update(dict.fromkeys(names, "/evil"))
    config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'"], saved=saved(tmp_path, content))
    assert all("/evil" not in str(config.query(name)) for name in names)


def test_values_stay_values(tmp_path):
    """Property: gin's references in a text are text."""
    content = settings_of()
    content["macros"]["SEPARATOR"] = "@chat.talk()"
    content["macros"]["TURN_SEPARATOR"] = "%MODEL_DIR"
    config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'"], saved=saved(tmp_path, content))
    assert config.query("SEPARATOR") == "@chat.talk()"
    assert config.query("TURN_SEPARATOR") == "%MODEL_DIR"


def test_a_network_of_ones_own_is_code(tmp_path):
    """Oracle: by hand. It is recorded, asked for where a verb needs it, and ignored elsewhere."""
    own = "models.EncoderDecoderModel.network = @own/t5.T5Config()"
    content = settings_of(own, "OPTIMIZER = @optimizer.AdamW()")
    assert set(content["code"]) == {"models.EncoderDecoderModel.network", "OPTIMIZER"}
    found = saved(tmp_path, content)
    with pytest.raises(UserError, match=r"EncoderDecoderModel.network .* code .*--gin_file=FILE"):
        config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'"], saved=found)
    config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'", own], saved=found)
    del content["code"]["models.EncoderDecoderModel.network"]  # inference has no OPTIMIZER
    config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'"], saved=saved(tmp_path, content))


def test_a_blenderbot_is_read_back_as_it_was(tmp_path):
    """Oracle: the same file and overrides given to the other verb. The command line wins."""
    prost, given = "gin/prost/prost_tiny.gin", ["MODEL_DIR = 'x'", "MAX_POSITIONS = 96"]
    config.load("gin/runs/train.gin", [prost], [*given, "FORBIDDEN_IDS = ()"])
    found = saved(tmp_path, json.loads(config.run_files()[saved_settings.FILE]))
    here = ["MODEL_DIR = '/elsewhere'", "DTYPE = 'bfloat16'"]
    config.load("gin/runs/infer.gin", [], here, saved=found, own_code=settings.OWN_CODE)
    network = config.call(blenderbot.BlenderbotConfig)
    assert config.call(models.EncoderDecoderModel).network == network
    assert (network.max_positions, network.forbidden_ids) == (96, ())
    assert config.query("TASK_FEATURE_LENGTHS") == {"inputs": 96, "targets": 64}
    config.load("gin/runs/infer.gin", [prost], [*given, "FORBIDDEN_IDS = ()", here[1]])
    assert network == config.call(blenderbot.BlenderbotConfig)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "settings.json is damaged"),
        ("[]", "settings.json is damaged"),
        ("[" * 100_000, "settings.json is damaged"),
        ('{"format": 99}', "newer version"),
        ('{"format": 1, "macros": [], "parameters": {}, "code": {}}', "three objects"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, expected):
    """One line with the file and the remedy."""
    (tmp_path / saved_settings.FILE).write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        saved_settings.read(tmp_path)
    assert "--gin_file" in str(caught.value)


def test_unknown_and_mistyped_values(tmp_path, caplog):
    """An unknown macro is a warning: another version may know it. A wrong type is an error."""
    content = settings_of()
    content["macros"]["OF_ANOTHER_VERSION"] = 1
    config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'"], saved=saved(tmp_path, content))
    assert "OF_ANOTHER_VERSION" in caplog.text
    assert "TRAIN_STEPS" not in caplog.text  # of another verb
    content["macros"]["MAX_NEW_TOKENS"] = [1]
    with pytest.raises(UserError, match=r"MAX_NEW_TOKENS=\(1,\); give a whole number"):
        config.load("gin/runs/infer.gin", [], ["MODEL_DIR = 'x'"], saved=saved(tmp_path, content))


@pytest.fixture
def evil(trained, tmp_path, monkeypatch):
    """A copy of a run whose config.gin imports a module that leaves a mark."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\ndef steps(): return 5\n"
    )
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "config.gin").read_text().replace("\nMAX_NEW_TOKENS = 8", "")
    head, _, rest = text.partition("\nfrom ")
    text = f"{head}\nimport evil_module\nfrom {rest}\nMAX_NEW_TOKENS = @evil_module.steps()\n"
    (run / "config.gin").write_text(text)
    yield run
    sys.modules.pop("evil_module", None)
    assert not (tmp_path / "executed").exists()


def test_nothing_in_a_folder_is_run(evil, tmp_path):
    """Oracle: the mark of the module that config.gin names. Then the same, older than
    settings.json: there the sizes that were given as parameters have to be given again."""
    records = tmp_path / "in.jsonl"
    records.write_text('{"turns": ["Hi."]}\n')
    command = ["infer", f"--gin.MODEL_DIR={evil}", f"--input={records}", "--quiet"]
    assert main([*command, f"--output={tmp_path / 'out.jsonl'}"]) == 0
    assert cosmo.load(str(evil)).session.lengths == {"inputs": 64, "targets": 32}
    (evil / "settings.json").unlink()
    sizes = ("emb_dim=32", "mlp_dim=32", "num_heads=2", "head_dim=16")
    command += [f"--gin.t5.T5Config.{size}" for size in sizes]
    # The same program: another length of answers compiles another, which may round otherwise.
    command += ["--max_new_tokens=8"]
    assert main([*command, f"--output={tmp_path / 'older.jsonl'}"]) == 0
    assert (tmp_path / "older.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()
    assert cosmo.load(str(evil)).session.lengths == {"inputs": 64, "targets": 32}


def test_the_module_of_a_runs_tasks_is_given_again(evil, tmp_path, capsys):
    """Oracle: the mark. Where tasks are read the module is named, elsewhere it is not needed."""
    path = evil / "settings.json"
    content = json.loads(path.read_text())
    content["macros"]["MIXTURE_OR_TASK_MODULE"] = "evil_module"
    path.write_text(json.dumps(content))
    for verb in ("eval", "infer"):
        assert main([verb, f"--gin.MODEL_DIR={evil}", "--quiet"]) == 1
        assert "give --gin.MIXTURE_OR_TASK_MODULE=evil_module" in capsys.readouterr().err
    records = tmp_path / "in.jsonl"
    records.write_text('{"turns": ["Hi."]}\n')
    command = ["infer", f"--gin.MODEL_DIR={evil}", f"--input={records}", "--quiet"]
    assert main([*command, f"--output={tmp_path / 'out.jsonl'}"]) == 0
