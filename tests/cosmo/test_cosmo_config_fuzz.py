"""Odd bindings on the command line: settings, or one line of error and exit code 1.

Oracle: the property itself. The bindings are drawn from a seeded generator: names and values that
people mistype, references that go round, syntax of gin and of Python in the wrong place.
"""

import collections
import random

import pytest

from cosmo.engine.base import command_line, config

RUN_FILE = "gin/runs/train.gin"
MAX_LINE = 2000  # characters of an error: a value is shortened, the list of known names is not
NAMES = (
    *("t5.T5Config.emb_dim", "data.DatasetConfig.seed", "train/data.DatasetConfig.seed"),
    *(
        "t5.T5Config",
        "t5.T5Config.nosuch",
        "nosuch.Thing.x",
        "train.train.steps",
        "gin.macro.value",
    ),
    *("TRAIN_STEPS/gin.macro.value", "gin.REQUIRED", "macro.value", "a", "a.b", "a/b/c.d", "a..b"),
    *("", "_", "..", "1x", "é", "x y", "@a", "%a", "include", "import os", "from os import path"),
)
VALUES = (
    *("%TRAIN_STEPS", "{'a': %TRAIN_STEPS}", "[%TRAIN_STEPS]", "%gin.REQUIRED", "%gin.NOSUCH"),
    *("%a/b", "%a.b", "%", "%%", "@", "@@", "@nosuch()", "@t5.T5Config", "@t5.T5Config()"),
    *("@gin.macro", "@gin.macro()", "@TRAIN_STEPS/gin.macro()", "@a/b/t5.T5Config()"),
    *("", "()", "[", "(1", "{'a'", "{}", "{1:2}", "'", '"', "'''", "\\", "\n", "1\n2", "\x00", "é"),
    *("\ud800", "#", "# x", "1 # x", "a\nimport os", "1=2", "==", "...", "*", "$(x)", "b'x'"),
    *(
        "lambda: 1",
        "__import__('os')",
        "include 'x.gin'",
        "True",
        "none",
        "nan",
        "1e999",
        "-1",
        "0",
    ),
    *("1j", "0x10", "1_000", "0777", "9" * 5000, "[" * 500 + "]" * 500, "[" * 50 + "]" * 50),
    "[" * 50 + "%TRAIN_STEPS" + "]" * 50,
)


def run(capsys, *given):
    """Load the settings as `train` does; return the exit code and the lines of error."""
    arguments = [f"--gin.{name}={value}" for name, value in given]

    def load():
        _, bindings = command_line.split_arguments(["--gin.MODEL_DIR=/tmp/x", *arguments])
        config.load(RUN_FILE, ["gin/cosmo/tiny.gin"], bindings)
        config.run_files()
        for name in config.macros_of(RUN_FILE):
            config.query(name)

    code = command_line.guarded(load)
    return code, capsys.readouterr().err.splitlines()


def check(capsys, *given):
    """Run, and check the property; return the exit code."""
    code, lines = run(capsys, *given)
    assert code in (0, 1) and len(lines) == code, (given, lines)
    assert all(line.startswith("error: ") and len(line) < MAX_LINE for line in lines), lines
    return code


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("TRAIN_STEPS", "%TRAIN_STEPS")], "TRAIN_STEPS refers to itself (TRAIN_STEPS -> TRAIN"),
        (
            [("TRAIN_STEPS", "%EVAL_PERIOD"), ("EVAL_PERIOD", "%TRAIN_STEPS")],
            "refers to itself (TRAIN_STEPS -> EVAL_PERIOD -> TRAIN_STEPS)",
        ),
        ([("TRAIN_STEPS", "[%TRAIN_STEPS]")], "refers to itself"),
        ([("TRAIN_STEPS", "@gin.macro()")], "set nowhere"),
        ([("TRAIN_STEPS", "9" * 5000)], "TRAIN_STEPS='9999"),
    ],
)
def test_odd_bindings_that_were_tracebacks(capsys, given, words):
    """Oracle: the words by hand."""
    check(capsys, *given)
    code, lines = run(capsys, *given)
    assert code == 1 and words in lines[0]


def test_a_macro_may_stand_for_another(capsys):
    """Oracle: by hand."""
    assert run(capsys, ("EVAL_PERIOD", "7"), ("TRAIN_STEPS", "%EVAL_PERIOD")) == (0, [])
    assert config.query("TRAIN_STEPS") == 7


@pytest.mark.parametrize(
    "count", [pytest.param(30, id="sample"), pytest.param(500, marks=pytest.mark.slow, id="all")]
)
def test_any_binding_is_a_setting_or_one_line(capsys, count):
    """Property: one line and exit code 1, or settings; never a traceback."""
    draw, codes = random.Random(count), collections.Counter()
    names = sorted(config.macros_of(RUN_FILE))
    for _ in range(count):
        code = check(
            capsys,
            *(
                (
                    draw.choice([*names, *NAMES]),
                    draw.choice([*VALUES, f"%{draw.choice(names)}"]),
                )
                for _ in range(draw.choice((1, 1, 2)))
            ),
        )
        codes[code] += 1
    print(f"\ngin: {count} command lines: {codes[0]} accepted, {codes[1]} refused in one line")
