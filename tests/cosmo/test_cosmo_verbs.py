"""Help pages and flags of the verbs."""

import dataclasses
import pathlib
import subprocess
import sys
import tomllib

import pytest

import cosmo
import data_pipeline.verbs
from canary.cli import program as canary_program
from cosmo.__main__ import main
from cosmo.cli.program import PROGRAM
from cosmo.engine.base import command_line
from cosmo.engine.base.errors import UserError


def output(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that ends in argparse."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code, *capsys.readouterr()


def test_the_list_of_verbs(capsys):
    """Property: every verb with its line."""
    code, text, _ = output(capsys, "--help")
    assert code == 0
    for name, verb in PROGRAM.verbs.items():
        assert name in text
        assert verb.help.split()[0] in text


@pytest.mark.parametrize("name", PROGRAM.verbs)
def test_each_verb_has_a_page(capsys, name):
    """Property: examples that parse, the common flags, and no other verb's."""
    code, text, _ = output(capsys, name, "--help")
    assert code == 0
    assert all(word in text for word in ("--quiet", "examples"))
    converts = name in ("import", "export", "push", "quickstart", "serve")  # no settings of gin's
    assert all((flag in text) != converts for flag in ("--gin_file", "--gin.NAME=VALUE"))
    assert max(map(len, text.splitlines())) <= 100
    assert ("--num_shards" in text) == (name == "infer")
    assert ("--situation" in text) == (name == "chat")
    examples = PROGRAM.verbs[name].examples.replace("\\\n", "").strip().splitlines()
    for example in examples:
        words = example.split()
        assert words[:4] == ["python", "-m", "cosmo", name]
        flags = [w for w in words[4:] if w.startswith("--") and not w.startswith("--gin.")]
        assert command_line.parse(PROGRAM, [name, *flags]).verb == name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--batch_size=4"], "did you mean --gin.BATCH_SIZE=4?"),
        (["infer", "--banned_ids=a"], "'a': expected whole numbers with commas"),
        (["eval", "--model_dir", "x"], "did you mean --gin.MODEL_DIR?"),
        (["infer", "--model=runs/a"], "did you mean --gin.MODEL_DIR=runs/a?"),
        (["chat", "--checkpoint=runs/a"], "did you mean --gin.MODEL_DIR=runs/a?"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--no_such_flag"], "train does not know --no_such_flag"),
        (["train", "--num_shards=2"], "it belongs to infer"),
        (["infer", "--temprature=1"], "did you mean --temperature?"),
        (["infer", "--temperature=warm"], "--temperature: invalid float value: 'warm'"),
        (["infer", "--num_shards=2.5"], "--num_shards: invalid int value: '2.5'"),
        (["infer", "--temp=1"], "infer does not know --temp"),
        (["chat", "hello"], "chat does not know hello"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, expected):
    """The error names the fault and the help; exit code 2."""
    code, text, error = output(capsys, *arguments)
    assert (code, text) == (2, "")
    assert expected in error
    assert error.count("\n") == 1
    assert "--help" in error


def with_infer(run, load_settings) -> command_line.Program:
    """The program cosmo with another function of `infer`, and another loader of settings."""
    infer = dataclasses.replace(PROGRAM.verbs["infer"], run=run)
    changed = {"verbs": {**PROGRAM.verbs, "infer": infer}, "load_settings": load_settings}
    return dataclasses.replace(PROGRAM, **changed)


def test_flags_are_bindings():
    """Oracle: by hand. Only what is given, with its type; other flags are none."""
    seen = []
    program = with_infer(lambda args: None, lambda args, verb, bindings: seen.extend(bindings))
    arguments = ["infer", "--top_k=3", "--temperature=1", "--mode=score", "--num_shards=4"]
    assert command_line.main(program, [*arguments, "--gin.EMB_DIM=3"]) == 0
    assert seen == ["EMB_DIM = 3", "MODE = 'score'", "TEMPERATURE = 1.0", "TOP_K = 3"]


PROGRAMS = pytest.mark.parametrize(
    "program",
    [PROGRAM, canary_program.PROGRAM, data_pipeline.verbs.PROGRAM],
    ids=["cosmo", "canary", "data_pipeline"],
)


@PROGRAMS
def test_no_verb_prints_the_help(program, capsys):
    """Property: the verbs are listed; exit code 2, for nothing was run."""
    assert command_line.main(program, []) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in program.verbs)


@PROGRAMS
def test_version(program, capsys):
    """Oracle: pyproject.toml."""
    wanted = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(SystemExit) as stopped:
        command_line.main(program, ["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{program.name} {wanted}\n"
    assert cosmo.__version__ == wanted


def test_an_error_names_the_flag_of_its_setting(capsys):
    """Oracle: by hand. A verb's own flag, else --gin.NAME, for an error that names a setting."""

    def fail(args):
        raise UserError("it is wrong", setting=("INFER_BATCH_SIZE", "window", "EMB_DIM"))

    program = with_infer(fail, lambda args, verb, bindings: None)
    assert command_line.main(program, ["infer"]) == 1
    expected = "error: it is wrong (--batch_size, --window, --gin.EMB_DIM)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("package", "verb"), [("cosmo", "infer"), ("canary", "label")])
def test_help_loads_neither_jax_nor_tensorflow(package, verb):
    """Property: a help page is there at once."""
    program = (
        "import sys; sys.modules['jax'] = sys.modules['tensorflow'] = None\n"
        f"from {package}.__main__ import main\n"
        f"main(['{verb}', '--help'])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
