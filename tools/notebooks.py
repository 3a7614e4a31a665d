"""Run the notebooks of docs/notebooks and keep their outputs: `make notebooks`.

A notebook starts from nothing, writes below /tmp, and its commands run from the repository's root.
Needs the extras `dev` and `plot`.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

import nbformat
from nbclient import NotebookClient

from cosmo.engine.base.atomic import write_atomic

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "notebooks"
CELL_SECONDS = 900  # the longest cell trains a small network
# A command that fails ends the notebook: IPython ignores exit codes by default.
KERNEL_ARGUMENTS = ["--InteractiveShell.system_raise_on_error=True"]
# Kept metadata: it must not differ between two machines or versions.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def paths() -> list[pathlib.Path]:
    """Return the files of all notebooks, sorted by name."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def run(path: pathlib.Path, folder: str = "/tmp") -> Any:
    """Return the notebook with new outputs; it writes below `folder`.

    Raises nbclient.exceptions.CellExecutionError if a cell or a command fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("/tmp/", f"{folder}/")
    # `python` in a command is this interpreter.
    python_folder = str(pathlib.Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([python_folder, os.environ["PATH"]]),
        "TTY_COMPATIBLE": "0",  # rich draws no moving progress
    }
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=KERNEL_ARGUMENTS,
    )
    return client.execute(env=environment)


def write(path: pathlib.Path, notebook: Any) -> None:
    """Write a notebook that ran in /tmp."""
    notebook.metadata = METADATA
    write_atomic(path, nbformat.writes(notebook) + "\n")


def main() -> None:
    """Run all notebooks, or those named, and write each with its new outputs."""
    names = [path.stem for path in paths()]
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    for name in parser.parse_args().names or names:
        path = NOTEBOOKS / f"{name}.ipynb"
        write(path, run(path))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
