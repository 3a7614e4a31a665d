"""The notebooks of docs/notebooks: their outputs are kept whole, and they run from nothing."""

import json
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.test_docs import check_command

PATHS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MAX_BYTES = 120_000
COMMAND = re.compile(r"^ *!(python -m (?:.*\\\n)*.*)$", re.MULTILINE)


def code_cells(notebook) -> list[dict]:
    """Return the code cells of a notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell) -> list[tuple[str, ...]]:
    """Return the kind of each output of a cell: a stream, or the forms of a value."""
    return [(out["output_type"], *sorted(out.get("data", ()))) for out in cell["outputs"]]


def test_the_website_lists_them():
    """Oracle: the navigation of mkdocs.yml and the page of notebooks."""
    names = ["canary", "checkpoints", "co3", "judging", "quickstart"]
    assert [path.stem for path in PATHS] == names
    navigation, index = (ROOT / "mkdocs.yml").read_text(), PATHS[0].with_name("index.md")
    for path in PATHS:
        assert f"notebooks/{path.stem}.md" in navigation
        assert f"]({path.name})" in index.read_text()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path):
    """Oracle: the order of one whole run, the parsers of the commands, the limit of size."""
    notebook = json.loads(path.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < MAX_BYTES
    plots = [cell for cell in cells if any("image/png" in kind for kind in kinds(cell))]
    assert plots and all(len(cell["metadata"]["alt"]) > 20 for cell in plots)
    assert not any("error" in kind for cell in cells for kind in kinds(cell))
    for cell in cells:
        for command in COMMAND.findall("".join(cell["source"])):
            words = shlex.split(command.replace("\\\n", " "))[2:]
            if not any("{command}" in word for word in words):
                check_command(words)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_nothing(path, tmp_path):
    """Oracle: no cell and no command fails; outputs are of the kinds that the file keeps."""
    pytest.importorskip("nbclient", reason="needs requirements.notebooks.lock")
    from tools import notebooks

    made = notebooks.run(path, str(tmp_path))
    kept = json.loads(path.read_text())
    assert [kinds(c) for c in code_cells(made)] == [kinds(c) for c in code_cells(kept)]
