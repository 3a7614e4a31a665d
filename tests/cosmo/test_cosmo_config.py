"""The command line: overrides, and one line for every mistake that a person makes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from cosmo.__main__ import main
from cosmo.engine.base import annotations, command_line, config
from cosmo.engine.base.errors import UserError

TINY = "gin/cosmo/tiny.gin"
TRAIN = "gin/runs/train.gin"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("/tmp/run", "'/tmp/run'"),
        ("gs://bucket/run", "'gs://bucket/run'"),
        ("'/tmp/run'", "'/tmp/run'"),
        ('"/tmp/run"', '"/tmp/run"'),
        ("60", "60"),
        ("1e-3", "1e-3"),
        ("None", "None"),
        ("True", "True"),
        ("false", "False"),
        ("none", "None"),
        ("{'inputs': %L}", "{'inputs': %L}"),
        ("{'inputs': 8, 'targets': 4}", "{'inputs': 8, 'targets': 4}"),
        ("('gelu', 'linear')", "('gelu', 'linear')"),
        ("%BATCH_SIZE", "%BATCH_SIZE"),
        ("@optimizer.AdamW()", "@optimizer.AdamW()"),
        ("constant * linear_warmup", "'constant * linear_warmup'"),
    ],
)
def test_bare_strings_are_quoted_and_gin_values_kept(given, read):
    """Oracle: the rule of the command line, T5X's quoting accepted too."""
    assert command_line.quote_bare(given) == read


def test_arguments_are_split():
    """Oracle: T5X's forms `--gin.A=b` and `--gin.A b`."""
    rest, bindings = command_line.split_arguments(
        ["train", "--gin.MODEL_DIR=/tmp/x", "--gin_file=a.gin", "--gin.TRAIN_STEPS", "7", "--quiet"]
    )
    assert rest == ["train", "--gin_file=a.gin", "--quiet"]
    assert bindings == ["MODEL_DIR = '/tmp/x'", "TRAIN_STEPS = 7"]
    with pytest.raises(UserError, match=r"--gin.TRAIN_STEPS has no value"):
        command_line.split_arguments(["--gin.TRAIN_STEPS", "--quiet"])


def test_the_last_word_wins(tmp_path):
    """Property: run file < files in order < command line."""
    later = tmp_path / "later.gin"
    later.write_text("BATCH_SIZE = 24\nSTATS_PERIOD = 3\n")
    config.load(TRAIN, [TINY, str(later)], ["MODEL_DIR = 'x'", "STATS_PERIOD = 4"])
    assert config.query("BATCH_SIZE") == 24
    assert config.query("STATS_PERIOD") == 4
    assert config.query("EVAL_PERIOD") == 200


def test_overrides_may_use_macros_and_whatever_the_files_import(tmp_path):
    """A macro of one's own, another optimizer, a per cent sign in a string."""
    bindings = ["MODEL_DIR = '100%sure'", "MINE = 24", "BATCH_SIZE = %MINE"]
    bindings += ["OPTIMIZER = @optimizer.AdamW()", "optimizer.AdamW.weight_decay = 0.1"]
    config.load(TRAIN, [TINY], bindings)
    assert "AdamW" in str(config.query("OPTIMIZER"))
    assert "BSIZE" in message([TINY], "MODEL_DIR = 'x'", "BATCH_SIZE = %BSIZE")


def test_search_paths(tmp_path):
    """A file found through --gin_search_paths, including another from there."""
    (tmp_path / "inner.gin").write_text("BATCH_SIZE = 48\n")
    (tmp_path / "outer.gin").write_text("include 'inner.gin'\nSTATS_PERIOD = 9\n")
    config.load(TRAIN, [TINY, "outer.gin"], ["MODEL_DIR = 'x'"], [str(tmp_path)])
    assert (config.query("BATCH_SIZE"), config.query("STATS_PERIOD")) == (48, 9)
    with pytest.raises(UserError, match="is not a folder"):
        config.load(TRAIN, [TINY], ["MODEL_DIR = 'x'"], [str(tmp_path / "none")])


def message(gin_files, *bindings) -> str:
    """The error of a load, checked to be one line."""
    with pytest.raises(UserError) as caught:
        config.load(TRAIN, gin_files, list(bindings))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_unknown_macro_on_the_command_line():
    """It is named, with where it stood and the nearest valid name."""
    text = message([TINY], "MODEL_DIR = 'x'", "TRAIN_STEP = 5")
    assert "TRAIN_STEP " in text
    assert "command line" in text
    assert "did you mean 'TRAIN_STEPS'" in text


def test_unknown_macro_in_a_file(tmp_path):
    """A macro that nothing uses is a misspelling, not a silent no-op."""
    path = tmp_path / "mine.gin"
    path.write_text("BATCHSIZE = 4\n")
    text = message([TINY, str(path)], "MODEL_DIR = 'x'")
    assert "BATCHSIZE" in text
    assert str(path) in text
    assert "'BATCH_SIZE'" in text


def test_undefined_macro(tmp_path):
    """A macro that is used and never set."""
    path = tmp_path / "mine.gin"
    path.write_text("BATCH_SIZE = %MY_BATCH\n")
    text = message([TINY, str(path)], "MODEL_DIR = 'x'")
    assert "MY_BATCH" in text
    assert "--gin.MY_BATCH=VALUE" in text


def test_missing_required_macro():
    """MODEL_DIR has no default: the message names it, the file that needs it and the flag."""
    text = message([TINY])
    assert "MODEL_DIR must be given" in text
    assert TRAIN in text
    assert "--gin.MODEL_DIR=VALUE" in text


def test_unknown_configurable(tmp_path):
    """The nearest class is offered, with file and line."""
    path = tmp_path / "mine.gin"
    path.write_text("\nt5.T5Confg.emb_dim = 3\n")
    text = message([TINY, str(path)], "MODEL_DIR = 'x'")
    assert "T5Confg" in text
    assert str(path) in text
    assert "T5Config" in text.replace("T5Confg", "")


def test_unknown_parameter():
    """The nearest parameter is offered."""
    text = message([TINY], "MODEL_DIR = 'x'", "t5.T5Config.embdim = 3")
    assert "embdim" in text
    assert "did you mean 't5.T5Config.emb_dim'?" in text


@pytest.mark.parametrize(
    ("binding", "meant"),
    [("t6.T5Config.emb_dim = 3", "t5.T5Config"), ("OPTIMIZER = @optimizer.Adaam()", "AdamW")],
)
def test_unknown_module_or_reference(binding, meant):
    """Oracle: the nearest name by hand. gin's own words about imports are not shown."""
    text = message([TINY], "MODEL_DIR = 'x'", binding)
    assert text.startswith("unknown name ")
    assert meant in text.partition("did you mean")[2]
    assert "import" not in text


def test_unknown_parameter_in_a_block(tmp_path):
    """gin's other form of a binding: file, line and the nearest parameter."""
    path = tmp_path / "mine.gin"
    path.write_text("t5.T5Config:\n  emb_dim = 3\n  num_heds = 2\n")
    text = message([TINY, str(path)], "MODEL_DIR = 'x'")
    assert f"{path}, line 3" in text
    assert "'t5.T5Config.num_heads'" in text


@pytest.mark.parametrize(
    ("binding", "wanted"),
    [
        ("BATCH_SIZE = 'abc'", "BATCH_SIZE='abc'; give a whole number"),
        ("BATCH_SIZE = 8.5", "BATCH_SIZE=8.5; give a whole number"),
        ("BATCH_SIZE = True", "BATCH_SIZE=True; give a whole number"),
        ("PACK = 1", "PACK=1; give True or False"),
        ("EVAL_STEPS = 'all'", "EVAL_STEPS='all'; give a whole number or None"),
        ("DROPOUT_RATE = '0.1'", "DROPOUT_RATE='0.1'; give a number"),
        ("MLP_ACTIVATIONS = 'gelu'", "MLP_ACTIVATIONS='gelu'; give a tuple of texts"),
        ("TASK_FEATURE_LENGTHS = {'inputs': 'x'}", "; give a dict of texts to whole numbers"),
        ("LABEL_STYLE = 'bold'", "LABEL_STYLE='bold'; give 'text' or 'sentinel'"),
        ("t5.T5Config.emb_dim = 'wide'", "t5.T5Config.emb_dim='wide'; give a whole number"),
        ("train/datasets.DatasetConfig.seed = 'x'", "train/datasets.DatasetConfig.seed='x'; give"),
    ],
)
def test_a_value_of_the_wrong_type(binding, wanted):
    """Oracle: the annotation of the parameter that the macro is bound to, read by hand."""
    assert wanted in message([TINY], "MODEL_DIR = 'x'", binding)


def test_the_setting_of_a_wrong_value_is_spelled_as_a_flag(capsys):
    """One line: the name, the value, what is wanted, and the flag."""
    arguments = ["train", f"--gin_file={TINY}", "--gin.MODEL_DIR=/nowhere", "--gin.BATCH_SIZE=abc"]
    assert main(arguments) == 1
    expected = "error: BATCH_SIZE='abc'; give a whole number (--gin.BATCH_SIZE)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("value", "wanted", "fits"),
    [
        (3, float, True),
        (True, float, False),
        (3, bool, False),
        (None, int | None, True),
        ("x", Sequence[str], False),
        (("x",), Sequence[str], True),
        (("x", 1), tuple[str, int], True),
        (("x",), tuple[str, int], False),
        ({"a": 1.5}, Mapping[str, int], False),
        ("b", Literal["a", "b"], True),
        (1, Literal[True], False),
        ("anything", Any, True),
    ],
)
def test_annotations(value, wanted, fits):
    """Oracle: PEP 484, but that a bool is no number and a text no sequence."""
    assert annotations.fits(value, wanted) == fits


def test_missing_gin_file():
    """It is named, with where it was looked for and the nearest that exists."""
    text = message(["gin/cosmo/tinny.gin"], "MODEL_DIR = 'x'")
    assert "gin/cosmo/tinny.gin" in text
    assert "'gin/cosmo/tiny.gin'" in text


def test_syntax_error(tmp_path):
    """File and line of what gin cannot read."""
    path = tmp_path / "mine.gin"
    path.write_text("BATCH_SIZE = 4\nTRAIN_STEPS = [1,\n")
    text = message([TINY, str(path)], "MODEL_DIR = 'x'")
    assert str(path) in text


def test_errors_of_constructors_come_through_clean(capsys):
    """A setting that a dataclass refuses is one line, without gin's call stack."""
    code = main(["train", f"--gin_file={TINY}", "--gin.MODEL_DIR=/nowhere", "--gin.DTYPE=float16"])
    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: T5Config.dtype='float16'")
    assert error.count("\n") == 1


def test_a_required_value_is_named_where_it_is_bound():
    """Oracle: by hand. The last macro of a chain, or the parameter itself."""
    given = ["MODEL_DIR = 'x'", "MINE = %gin.REQUIRED", "BATCH_SIZE = %MINE"]
    given += ["optimizer.AdamW.weight_decay = %gin.REQUIRED"]
    assert "MINE, optimizer.AdamW.weight_decay must be given" in message([TINY], *given)
