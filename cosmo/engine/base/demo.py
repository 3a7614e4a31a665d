"""Run a demo: its stages are commands, its output folder is made anew each time."""

import contextlib
import fnmatch
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import only_writer, prepare_folder

MARKER = ".made_by_demo"
LOCK = ".demo.lock"  # held from the first stage to the report; training has a lock of its own
# Names that a run or a demo leaves, however early it ended: a first start that crashed may have
# left no marker.
LEFTOVERS = (
    *("checkpoints", "run_id", "config.gin", "settings.json", "metrics.jsonl", "tensorboard"),
    *("tracker_id", "wandb"),
    *("vocabulary.model", "best", "bad_steps", "bad_steps.jsonl", "damaged_checkpoints"),
    *("loss.png", "eval", "canary_eval", "answers.jsonl", "corpus", "data", "model", "run"),
    *(".lock", LOCK, MARKER),
    *(".*.partial", ".writable-*"),  # of atomic writes and of the probe of `prepare_folder`
)


@contextlib.contextmanager
def demo_folder(path: str, demo: str, default: str) -> Iterator[pathlib.Path]:
    """Yield the empty folder `path`, marked as the one of `demo`, and locked until the block ends.

    The files of an earlier start are removed, complete or not. A folder without the marker is
    removed only if it is the demo's `default` and holds nothing but what a run leaves. Raises
    UserError for any other folder, or one that another process is writing to.
    """
    folder = pathlib.Path(path)
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: give another folder", setting="output")
        entries = [entry.name for entry in folder.iterdir() if entry.name != LOCK]
        marker = folder / MARKER
        marked = marker.exists() and marker.read_text().strip() == demo
        others = entries
        if folder == pathlib.Path(default):
            others = [name for name in entries if not _is_leftover(name)]
        if others and not marked:
            raise UserError(
                f"{folder} holds {others[0]} and is no folder of a {demo}: give another folder",
                setting="output",
            )
        if entries:
            # A training that still runs must not lose its files.
            with only_writer(folder, "output"):
                pass
    prepare_folder(str(folder), "output")
    # Nor must a demo, also between its stages, and while its training is in a folder below.
    with only_writer(folder, "output", LOCK):
        earlier = [entry for entry in folder.iterdir() if entry.name != LOCK]
        if earlier:
            print(f"removing what an earlier {demo} left in {folder} (--output=FOLDER keeps it)")
        for entry in earlier:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        write_atomic(folder / MARKER, f"{demo}\n")
        yield folder


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
