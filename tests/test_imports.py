"""The direction of imports between rooms, read from the source, function-level imports included."""

import ast
import functools
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("cosmo", "canary", "tasks", "data_pipeline", "tools")
# The rooms of the engine, from the ground up: a room imports itself and the rooms before it.
ENGINE = ("base", "model", "data", "scale", "checkpoints", "infer", "train")
# Every other room -> the rooms that it may import, beside itself.
_ENGINE_ROOMS = {"cosmo.engine.web", *(f"cosmo.engine.{room}" for room in ENGINE)}
_PIPELINE_ROOMS = {f"data_pipeline.{name}" for name in ("calls", "co3", "annotation", "prosocial")}
ALLOWED = {
    **{
        f"cosmo.engine.{room}": {f"cosmo.engine.{lower}" for lower in ENGINE[:place]}
        for place, room in enumerate(ENGINE)
    },
    # HTTP for all servers, beside the stack: no model is behind it.
    "cosmo.engine.web": {"cosmo.engine.base"},
    "cosmo.tasks": {"cosmo.engine.base"},
    "data_pipeline.calls": {"cosmo.engine.base"},
    "data_pipeline.co3": {"cosmo.engine.base", "cosmo.tasks", "data_pipeline.calls"},
    "data_pipeline.annotation": {
        "cosmo.engine.base",
        "cosmo.engine.web",
        "cosmo.tasks",
        "data_pipeline.calls",
    },
    # ProsocialDialog is made by CO3's engine, and by people on the pages of annotation.
    "data_pipeline.prosocial": {
        "cosmo.engine.base",
        "cosmo.tasks",
        "data_pipeline.calls",
        "data_pipeline.co3",
        "data_pipeline.annotation",
    },
    "data_pipeline": {"cosmo.engine.base"},  # names its rooms' verbs without importing them
    "canary": {*_ENGINE_ROOMS, "cosmo.tasks"},
    "cosmo": {*_ENGINE_ROOMS, "cosmo.tasks", "cosmo.serve", "canary"},
    "cosmo.serve": {*_ENGINE_ROOMS, "cosmo.tasks", "cosmo", "canary"},
    "tools": {
        *_ENGINE_ROOMS,
        "cosmo",
        "cosmo.serve",
        "cosmo.tasks",
        "canary",
        "data_pipeline",
        *_PIPELINE_ROOMS,
    },
}
HEAVY = {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"}
# Modules that load TensorFlow as they load. Every other module imports it inside a function.
SEQIO_MODULES = {
    "tasks/seqio_tasks.py",
    "tasks/seqio_vocabulary.py",
    "tasks/prost_seqio.py",
    "tasks/tfds_builders",
}


def sources() -> list[pathlib.Path]:
    """Return every product source file, each once: cosmo/tasks is a link to tasks."""
    paths = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return [p for p in paths if not str(p.relative_to(ROOT)).startswith("cosmo/tasks/")]


def module_name(path: pathlib.Path) -> str:
    """Return the name that other modules import: tasks is cosmo.tasks."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("cosmo", *parts) if parts[0] == "tasks" else parts)


def room(module: str) -> str:
    """Return the room of a module: the longest entry of ALLOWED that it lies in."""
    return max((r for r in ALLOWED if f"{module}.".startswith(f"{r}.")), key=len)


def statements(tree: ast.AST):
    """Yield (name, node) for every import statement, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


@functools.cache
def graph() -> dict[str, dict[str, int]]:
    """Return {module: {imported module of ours: line}}."""
    names = {module_name(path): path for path in sources()}
    found: dict[str, dict[str, int]] = {}
    for name, path in names.items():
        found[name] = {}
        for imported, node in statements(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and imported == node.module:
                # `from package import module` imports the module; the package is only its address.
                full = {f"{imported}.{alias.name}" for alias in node.names}
                if full <= names.keys():
                    continue
            if imported in names and imported != name:
                found[name].setdefault(imported, node.lineno)
    return found


@pytest.mark.parametrize("module", sorted(map(module_name, sources())))
def test_imports_point_one_way(module):
    """Oracle: the table ALLOWED."""
    here = room(module)
    for imported, line in graph()[module].items():
        there = room(imported)
        if there != here:
            assert there in ALLOWED[here], f"{module}:{line} imports {imported}"


def test_there_are_no_circles():
    """Oracle: a topological order of all modules exists."""
    try:
        tuple(graphlib.TopologicalSorter(graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_a_newcomer_reads_at_most_20_files_to_understand_train():
    """Oracle: the modules that cosmo.engine.train.train reaches, without those of base."""
    seen, todo = set(), ["cosmo.engine.train.train"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += graph()[module]
    read = sorted(m for m in seen if room(m) != "cosmo.engine.base")
    assert len(read) <= 20, f"{len(read)} files: {read}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_tensorflow_is_imported_inside_functions(path):
    """Oracle: import statements at module level, but for the modules that are about SeqIO."""
    if str(path.relative_to(ROOT)).startswith(tuple(SEQIO_MODULES)):
        return
    for node in ast.parse(path.read_text()).body:
        for name, _ in statements(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert name.split(".")[0] not in HEAVY, f"{path}:{node.lineno} imports {name}"


def test_gin_is_imported_by_one_module():
    """Oracle: the rule of WORKSPACE.md."""
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        for name, _ in statements(ast.parse(path.read_text()))
        if name.split(".")[0] == "gin"
    }
    assert users == {"cosmo/engine/base/config.py"}


def test_gin_folder_is_no_package():
    """A gin/__init__.py would shadow the installed gin."""
    assert not list((ROOT / "gin").rglob("__init__.py"))
