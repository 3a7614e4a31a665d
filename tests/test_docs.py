"""The documentation: each command exists, each block is run or says why not, each job is found."""

import ast
import asyncio
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys

import pytest

from cosmo.engine.base import command_line
from tests import docs_blocks, tiny_models
from tests.docs_blocks import ROOT
from tests.sizes import TINY

PROGRAMS = {
    "canary": "canary.cli.program",
    "canary.prost": "canary.prost.cli.program",
    "cosmo": "cosmo.cli.program",
    "data_pipeline": "data_pipeline.verbs",
}
BLOCKS = docs_blocks.blocks()
RUN_PAGES = sorted({block.page for block in BLOCKS if block.runs})


def place(block: docs_blocks.Block) -> str:
    """Return "page:line" of a block."""
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("block", BLOCKS, ids=place)
def test_every_block_has_a_language_and_a_mark(block):
    """Oracle: the rules of tests/docs_blocks.py."""
    assert block.language in docs_blocks.LANGUAGES, f"{place(block)}: ```{block.language}"
    if block.language in docs_blocks.RUNNABLE:
        assert block.is_marked, f"{place(block)}: <!-- run --> or <!-- not run: REASON --> above it"
    else:
        assert not block.mark, f"{place(block)}: only sh, console and python are run"


@functools.cache
def macros() -> set[str]:
    """Return the names of all gin macros."""
    texts = [path.read_text() for path in (ROOT / "gin").rglob("*.gin")]
    return {name for text in texts for name in re.findall(r"^([A-Z][A-Z0-9_]*) = ", text, re.M)}


def check_command(words: list[str]) -> None:
    """Parse a command as its program does; of a tool, look for its flags in its source."""
    module, *arguments = words
    if module in PROGRAMS:
        program = importlib.import_module(PROGRAMS[module]).PROGRAM
        arguments, bindings = command_line.split_arguments(arguments)
        for binding in bindings:
            name = binding.partition(" = ")[0]
            assert "." in name or name in macros(), f"no macro {name}"
        arguments = command_line._joined(program, arguments)
        if set(arguments[1:]) <= {"--help", "--version"}:  # a verb or a group alone is a name
            known = {word for verb in program.verbs for word in (verb, verb.split()[0])}
            assert set(arguments[:1]) <= {*known, "--help", "--version"}
        else:
            assert command_line.parse(program, arguments)
    elif module.split(".")[0] in ("cosmo", "canary", "data_pipeline", "tools", "tests"):
        source = importlib.util.find_spec(module)
        assert source is not None, f"no module {module}"
        known = set(re.findall(r"--\w+", (ROOT / source.origin).read_text()))
        given = {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help"}
        # The parts of tools.bench are files of their own; all that ask a model share flags.
        parts = (ROOT / "tools").glob(f"{module.removeprefix('tools.')}_*.py")
        for path in (*parts, ROOT / "data_pipeline" / "calls" / "flags.py"):
            known |= set(re.findall(r"--\w+", path.read_text()))
        assert given <= known, f"no flag {given - known}"


@pytest.mark.parametrize("page", docs_blocks.pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_exists(page, capsys):
    """Oracle: the parsers of the programs, the names of macros, the sources of tools."""
    name = str(page.relative_to(ROOT))
    commands = [
        words
        for block in BLOCKS
        if block.page == name and block.language in ("sh", "console")
        for command, _ in block.commands()
        for words in docs_blocks.python_commands(command)
    ]
    for words in [*commands, *docs_blocks.inline_commands(page)]:
        try:
            check_command(words)
        except (AssertionError, SystemExit) as error:
            pytest.fail(f"{name}: python -m {' '.join(words)}: {error} {capsys.readouterr().err}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=place)
def test_every_import_of_a_python_block_exists(block):
    """Oracle: the modules themselves."""
    tree = compile(block.text, place(block), "exec", PYTHON_FLAGS)
    for node in ast.walk(tree):
        ours = isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "cosmo",
            "canary",
            "data_pipeline",
        )
        for alias in node.names if ours else ():
            module = importlib.import_module(node.module)
            inside = hasattr(module, alias.name)
            assert inside or importlib.util.find_spec(f"{node.module}.{alias.name}")


PYTHON_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST


RECIPES = {"run": "gin/cosmo/tiny.gin", "canary": "gin/canary/canary_tiny.gin"}
WITHOUT_EVALUATION = ("--gin.EVAL_PERIOD=None", "--gin.EARLY_STOPPING_PATIENCE=None")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """`model(name)` -> the folder of a run of Cosmo, a Canary or a Prost: tiny, hardly trained."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name):
        place = folder / name
        if name == "prost":
            place.mkdir()
            return tiny_models.write_prost(place)
        train = ["train", f"--gin_file={RECIPES[name]}", f"--gin.MODEL_DIR={place}", *TINY]
        command = [sys.executable, "-m", "cosmo", *train, "--gin.TRAIN_STEPS=2"]
        subprocess.run([*command, *WITHOUT_EVALUATION], cwd=ROOT, check=True)
        return place

    return make


# Training and caching of a page run on the smallest network, for two steps unless the page has a
# number of its own.
PRELUDE = f"""
set -e
python() {{
  case "$*" in
    "-m cosmo train "*TRAIN_STEPS*) command python "$@" {" ".join(TINY)} ;;
    "-m cosmo train "*) command python "$@" {" ".join(TINY)} --gin.TRAIN_STEPS=2 ;;
    "-m cosmo cache "*) command python "$@" {" ".join(TINY)} ;;
    *) command python "$@" ;;
  esac
}}
"""


@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_blocks_of_a_page_run(page, model, tmp_path, monkeypatch):
    """Oracle: exit code 0 of each command, and the output that the page shows."""
    monkeypatch.setenv("PATH", f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in (block for block in BLOCKS if block.page == page and block.runs):
        for name in block.models:
            if not (tmp_path / name).exists():
                shutil.copytree(model(name), tmp_path / name)
        if block.language == "python":
            run_python(here(block.text, tmp_path), place(block), namespace)
            continue
        for command, expected in block.commands():
            script = PRELUDE + here(command, tmp_path)
            done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{place(block)}: {command}\n{done.stderr}"
            if expected:
                pattern = re.escape(expected.rstrip()).replace(r"\.\.\.", ".*?")
                assert re.fullmatch(pattern, done.stdout.rstrip(), re.DOTALL), done.stdout


def here(text: str, folder) -> str:
    """Return a block's text with /tmp and the quickstart's run in `folder`."""
    # /tmp first: the folder's own name may begin so.
    return text.replace("/tmp/", f"{folder}/").replace("runs/quickstart", f"{folder}/run")


def run_python(text: str, name: str, namespace: dict[str, object]) -> None:
    """Run a Python block, which may await."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(text, name, "exec", flags)
    with contextlib.redirect_stdout(sys.stderr):
        done = eval(code, namespace)
        if inspect.iscoroutine(done):
            asyncio.run(done)


# A task of a reader -> words that they search for. The page must be one click from the index.
TASKS = {
    "train on my data": ("Your data", "train"),
    "resume a run": ("the same command goes on", "train"),
    "change a setting": ("--gin.NAME=value", "train"),
    "stop early": ("EARLY_STOPPING_PATIENCE", "train"),
    "cache a large corpus": ("python -m cosmo cache", "cache"),
    "measure a checkpoint": ("python -m cosmo eval", "evaluate"),
    "answer a file of records": ("python -m cosmo infer", "infer"),
    "talk to a model": ("python -m cosmo chat", "chat"),
    "serve a model": ("python -m cosmo serve", "serve"),
    "use a model in Python": ("cosmo.load", "python"),
    "label a corpus": ("python -m canary label", "canary"),
    "guard a server": ("python -m canary guard", "guard"),
    "ground answers in rules": ("python -m canary.prost reply", "prost"),
    "export to HuggingFace": ("python -m cosmo export --format=hf", "checkpoints"),
    "plan a TPU slice": ("python -m cosmo plan", "accelerators"),
    "make a corpus": ("python -m data_pipeline co3", "co3"),
    "change a prompt": ("Change a prompt", "extend"),
    "add a task": ("Add a task", "extend"),
    "compare two systems by people": ("annotate pairs", "annotation"),
    "find a table of the papers": ("python -m tools.papers", "papers"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_found_in_two_clicks_or_one_search(task):
    """Oracle: the index links to the page, and the page has the words that one searches for."""
    words, page = TASKS[task]
    assert len(TASKS) == 20
    assert f"]({page}.md)" in (ROOT / "docs" / "index.md").read_text()
    assert words in (ROOT / "docs" / f"{page}.md").read_text()


IMAGE = re.compile(r'!\[([^\]]*)\]\(([^)#]+)[^)]*\)|<img(?=[^>]*alt="([^"]+)")[^>]*src="([^"]+)"')


@pytest.mark.parametrize("page", docs_blocks.pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_image_exists_and_has_an_alternative_text(page):
    """Oracle: the files; of a figure in light there is one in dark too."""
    text = page.read_text()
    found = [(m[1] or m[3], m[2] or m[4]) for m in IMAGE.finditer(text)]
    assert len(found) == len(re.findall(r"!\[|<img", text))
    for about, name in found:
        assert len(about) > 5, f"{name} has no alternative text"
        assert (page.parent / name).is_file(), name
        if name.endswith("-light.svg"):
            assert (page.parent / name.replace("-light", "-dark")).is_file()
            figure = name.rsplit("/", 1)[1].removesuffix("-light.svg")
            assert (ROOT / "docs" / "figures" / f"{figure}.json").is_file()


def test_the_readme_is_short():
    """Oracle: the limit of 900 words."""
    assert len((ROOT / "README.md").read_text().split()) <= 900
