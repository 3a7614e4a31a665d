"""Run a demo: its stages are commands, and it begins in an empty output folder each time."""

import contextlib
import fnmatch
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import explained
from cosmo.engine.base.folders import only_writer, prepare_folder

MARKER = ".made_by_demo"
FINISHED = ".demo_finished"  # written after the last stage
LOCK = ".demo.lock"  # held from the first stage to the report; training has a lock of its own
# Names that a run or a demo leaves, however early it ended: a first start that crashed may have
# left no marker.
LEFTOVERS = (
    *("checkpoints", "run_id", "config.gin", "settings.json", "metrics.jsonl", "tensorboard"),
    *("tracker_id", "wandb"),
    *("vocabulary.model", "best", "bad_steps", "bad_steps.jsonl", "damaged_checkpoints"),
    *("loss.png", "eval", "canary_eval", "answers.jsonl", "corpus", "data", "model", "run"),
    *(".lock", LOCK, MARKER, FINISHED),
    *(".*.partial", ".writable-*"),  # of atomic writes and of the probe of `prepare_folder`
)


@contextlib.contextmanager
def demo_folder(path: str, demo: str, default: str) -> Iterator[pathlib.Path]:
    """Yield the empty folder `path`, marked as the one of `demo`, and locked until the block ends.

    A finished demo's folder is renamed to `PATH-previous`, in place of the one before. The files of
    an unfinished one are removed. A folder without the marker is emptied only if it is the demo's
    `default` and holds nothing but what a run leaves. Raises UserError for any other folder, or one
    that another process is writing to.
    """
    folder = pathlib.Path(path)
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: give another folder", setting="output")
        entries = [entry.name for entry in folder.iterdir() if entry.name != LOCK]
        marked = _demo_of(folder) == demo
        others = entries
        if folder == pathlib.Path(default):
            others = [name for name in entries if not _is_leftover(name)]
        if others and not marked:
            raise UserError(
                f"{folder} holds {others[0]} and is no folder of a {demo}: give another folder",
                setting="output",
            )
        if entries:
            # A training that still runs must not lose its files, nor must a demo between stages.
            with only_writer(folder, "output"), only_writer(folder, "output", LOCK):
                if (folder / FINISHED).exists():
                    _keep(folder, demo)
    prepare_folder(str(folder), "output")
    # Until the end, because the demo's training may be in a folder below, with a lock of its own.
    with only_writer(folder, "output", LOCK):
        earlier = [entry for entry in folder.iterdir() if entry.name != LOCK]
        if earlier:
            print(f"removing what an unfinished {demo} left in {folder}")
        for entry in earlier:
            _remove(entry)
        write_atomic(folder / MARKER, f"{demo}\n")
        yield folder
        write_atomic(folder / FINISHED, "")


def _keep(folder: pathlib.Path, demo: str) -> None:
    """Rename a finished demo's folder to its neighbour `-previous`, and remove what was there."""
    previous = folder.absolute().with_name(f"{folder.absolute().name}-previous")
    if previous.exists() and _demo_of(previous) != demo:
        raise UserError(
            f"{previous}, where the finished {demo} of {folder} would be kept, is no folder of a "
            f"{demo}: rename it, or give another folder",
            setting="output",
        )
    _remove(previous)
    with explained(folder, "rename it, or give another folder", "output"):
        folder.rename(previous)
    print(f"the finished {demo} of {folder} is kept in {previous}; a new one begins")


def _demo_of(folder: pathlib.Path) -> str:
    """Return the demo whose marker `folder` has, or an empty text."""
    marker = folder / MARKER
    return marker.read_text().strip() if marker.exists() else ""


def _remove(path: pathlib.Path) -> None:
    """Remove a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_module(package: str, *arguments: str, accepted: Collection[int] = (0,)) -> int:
    """Print and run `python -m package arguments`; return its exit code.

    Exits with the code if it is not an accepted one.
    """
    print(f"\n$ python -m {package} {' '.join(arguments)}", flush=True)
    # A process a stage, as a user would run it: none depends on what another has loaded.
    code = subprocess.run([sys.executable, "-m", package, *arguments]).returncode
    if code not in accepted:
        sys.exit(code)
    return code


def _is_leftover(name: str) -> bool:
    """Return whether a run or a demo of ours leaves a file or folder of this name."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in LEFTOVERS)
