"""The direction of imports between our packages, read from the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("cosmo", "canary", "tasks", "data_pipeline", "tools")
# package -> what of ours it may import. The three ground floors import nothing of ours.
ALLOWED = {
    "tasks": {"tasks"},
    "data_pipeline": {"data_pipeline"},
    "cosmo.engine": {"cosmo.engine"},
    "cosmo": {"cosmo", "cosmo.engine", "tasks"},
    "canary": {"canary", "cosmo.engine", "tasks"},
    "tools": {"tools", "cosmo", "cosmo.engine", "canary", "tasks", "data_pipeline"},
}
HEAVY = {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"}
# The modules that may load TensorFlow as they load; everybody else imports it inside a function.
SEQIO_MODULES = {"tasks/seqio_tasks.py", "tasks/tfds_builders"}


def sources():
    """Every source file of ours that is no test."""
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def room(module: str) -> str:
    return "cosmo.engine" if module.startswith("cosmo.engine") else module.split(".")[0]


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    """Oracle: the table ALLOWED."""
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, node in imports(ast.parse(path.read_text())):
        there = room(name)
        # `from cosmo import engine` names the package first, then the room.
        if name == "cosmo" and isinstance(node, ast.ImportFrom):
            continue
        if there.split(".")[0] in PACKAGES:
            assert there in ALLOWED[here], f"{path}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_tensorflow_is_imported_inside_functions(path):
    """Oracle: import statements at module level, but for the modules that are about SeqIO."""
    if str(path.relative_to(ROOT)).startswith(tuple(SEQIO_MODULES)):
        return
    for node in ast.parse(path.read_text()).body:
        for name, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert name.split(".")[0] not in HEAVY, f"{path}:{node.lineno} imports {name}"


def test_gin_is_imported_by_config_alone():
    """Oracle: the rule of WORKSPACE.md."""
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        for name, _ in imports(ast.parse(path.read_text()))
        if name.split(".")[0] == "gin"
    }
    assert users == {"cosmo/engine/config.py"}


def test_no_file_is_longer_than_400_lines():
    """Oracle: the rule of WORKSPACE.md."""
    assert not [str(p) for p in sources() if len(p.read_text().splitlines()) > 400]


def test_gin_folder_is_no_package():
    """A gin/__init__.py would shadow the installed gin."""
    assert not list((ROOT / "gin").rglob("__init__.py"))
