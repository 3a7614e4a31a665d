"""Read and write a run's own checkpoints, MODEL_DIR/checkpoints/STEP, with Orbax.

A checkpoint holds the state's arrays ("state"), a description of network and vocabulary, and the
run's progress (position in the data, bad steps) as JSON.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from cosmo.engine.base import byte_level_bpe
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote
from cosmo.engine.checkpoints import integrity
from cosmo.engine.checkpoints.description import (
    Path,
    check_network,
    check_same_vocabulary,
    check_shapes,
    flat,
)
from cosmo.engine.model.step import TrainState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"  # in MODEL_DIR, as are BEST and VOCABULARY
BEST = "best"  # a text file with the best step's number, of a run with early stopping
VOCABULARY = "vocabulary.model"  # the SentencePiece model or byte-level BPE of the token ids
COMMITTED = "commit_success.txt"  # in a checkpoint: Orbax's mark that it is finished

# Chunks hold at most a few layers, so that a conversion can read one without the rest of its stack.
CHUNK_BYTES = 64 * 2**20


class Start(NamedTuple):
    """The contents of a checkpoint to start from. Without `opt_state` the optimizer starts anew."""

    step: int
    params: Any
    opt_state: Any | None


class StartingPoint:
    """The start of a new run. This base class means no checkpoint: fresh parameters at step 0.

    `initial.InitialCheckpoint` is one. Training imports this interface alone, so it depends on no
    other system's format.
    """

    path: str | None = None

    def step(self) -> int:
        """Return the checkpoint's step, 0 if there is no checkpoint."""
        return 0

    def read(
        self, abstract: TrainState, shardings: TrainState, description: dict[str, Any]
    ) -> Start | None:
        """Return the checkpoint's arrays on the devices, None if there is no checkpoint."""
        return None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, which checkpoints it keeps, and the one that it starts from.

    `save_period` is in steps; None saves at every evaluation. `keep` is the number of newest
    checkpoints kept; None keeps all. Early stopping keeps its best one besides. A save that takes
    more than `save_timeout` seconds is an error.
    """

    save_period: int | None = None
    keep: int | None = 3
    restore: StartingPoint = StartingPoint()
    save_timeout: int = 1200

    def __post_init__(self):
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise UserError(f"KEEP_CHECKPOINTS={self.keep!r}; give at least 1, or None for all")
        if not isinstance(self.save_timeout, int) or self.save_timeout < 1:
            raise UserError(f"SAVE_TIMEOUT={self.save_timeout!r}; give seconds, at least 1")


class _KeepNewestAndBest(NamedTuple):
    """Orbax's preservation policy: keep the newest checkpoints and the best one."""

    newest: int | None
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        best, newest = self.best(), self.newest
        old = 0 if newest is None else len(checkpoints) - newest
        return [place >= old or info.step == best for place, info in enumerate(checkpoints)]


def manager(
    model_dir: str,
    keep: int | None = None,
    *,
    best: Callable[[], int | None] = lambda: None,
    read_only: bool = False,
    async_options=None,
):
    """Return an Orbax CheckpointManager over MODEL_DIR/checkpoints."""
    # Here and below Orbax is imported inside functions: it takes seconds to load, and many commands
    # need only the names in this module.
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        preservation_policy=_KeepNewestAndBest(keep, best),
        create=not read_only,
        enable_async_checkpointing=True,
        read_only=read_only,
        async_options=async_options,
    )
    return ocp.CheckpointManager(
        # Orbax refuses relative paths.
        epath.Path(model_dir).resolve() / FOLDER,
        options=options,
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "description": ocp.JsonCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        },
    )


def start_saving(manager, step: int, state: Any, description: Any, progress: Any) -> None:
    """Start to write `state` in the background.

    `CheckpointWriter` calls this and reports errors of the writing threads.
    """
    import orbax.checkpoint as ocp

    def chunked(array):
        # Only large stacks are cut along layers. With `shard_axes` Orbax cuts down to single rows:
        # an embedding would become as many chunks as it has pieces.
        stack = array.ndim > 2 and array.nbytes > CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stack else ())

    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state, jax.tree.map(chunked, state)),
            description=ocp.args.JsonSave(description),
            progress=ocp.args.JsonSave(progress or {}),
        ),
        force=True,  # the caller has decided to save; Orbax's own rules do not apply
    )


def read_progress(saver, step: int) -> dict[str, Any]:
    """Return the progress saved at `step`; empty in an imported checkpoint, which has none."""
    # Orbax raises an error for an item that is not there.
    if not (epath.Path(saver.directory) / str(step) / "progress").exists():
        return {}
    return _read_json(saver, step, "progress")


def restore_state(saver, step: int, abstract: Any, description: dict[str, Any]) -> Any:
    """Return the state saved at `step`, laid out as `abstract` (ShapeDtypeStructs with shardings).

    Raises UserError if it has another vocabulary, network or shape, or cannot be read.
    """
    import orbax.checkpoint as ocp

    # Compare first: Orbax's own errors about other shapes are a page of tree.
    _check(saver, step, abstract, description)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    with one_line_errors(f"checkpoint {saver.directory}/{step} cannot be read"):
        state = saver.restore(step, args=args)["state"]
    _check_step(state.step, step, saver.directory)
    return state


def _check_step(found: Any, step: int, folder: epath.PathLike) -> None:
    """Raise UserError unless the state's own step is that of its folder."""
    # Checkpoints of older versions have no step in their checksums.
    if int(found) != step:
        raise UserError(
            f"checkpoint {folder}/{step} holds the state of step {int(found)}: the folder was "
            "renamed or exchanged; give it its own name again"
        )


def locate(path: epath.PathLike) -> tuple[str, int] | None:
    """Return (MODEL_DIR, step) of our own checkpoint at `path`, None if there is none.

    `path` is a run's MODEL_DIR (the newest sound checkpoint), one checkpoint in it, or
    MODEL_DIR/best. Raises UserError if the named checkpoint, or every one of a run, is damaged.
    """
    folder = epath.Path(path)
    # Early stopping moves `best` by writing a number: a link would not work in a bucket.
    if folder.name == BEST and folder.exists() and not folder.is_dir():
        folder = folder.parent / FOLDER / folder.read_text().strip()
        if not folder.exists():
            raise UserError(f"{path} names {folder}, which is not there any more")
    # A checkpoint that is named is used or refused, never exchanged for an earlier one.
    if folder.name.isdigit() and folder.parent.name == FOLDER:
        if not (folder / COMMITTED).exists():
            raise UserError(f"checkpoint {path} was not finished: it has no {COMMITTED}")
        damage = _damage(folder)
        if damage:
            raise UserError(f"checkpoint {path} is damaged: {damage}; give another one of the run")
        return str(folder.parent.parent), int(folder.name)
    damages = []
    for step in reversed(completed_steps(path)):
        damage = _damage(folder / FOLDER / str(step))
        if not damage:
            return str(path), step
        # A reader moves nothing: the run itself moves damaged checkpoints when it resumes.
        where = f"{path}/{FOLDER}/{step}"
        log.warning("checkpoint %s is damaged and not used: %s", where, damage)
        damages.append(damage)
    if damages:
        raise UserError(f"every checkpoint in {path} is damaged, the newest one: {damages[0]}")
    return None


def _damage(folder: epath.Path) -> str | None:
    """Return what is damaged in a checkpoint, or None. Checks again only if a file has changed."""
    if is_remote(folder):
        return _damage_of(str(folder))
    # Times of change are cheap to read on a disk; in a bucket each costs a request.
    files = sorted(pathlib.Path(folder).rglob("*"))
    return _damage_of(str(folder), *((f.name, f.stat().st_mtime_ns) for f in files))


# Checksums read every byte, and one command locates its checkpoint several times.
@functools.lru_cache(maxsize=64)
def _damage_of(folder: str, *_files: tuple[str, int]) -> str | None:
    return integrity.find_damage(folder)


def completed_steps(model_dir: epath.PathLike) -> list[int]:
    """Return the steps of all finished checkpoints, ascending."""
    folder = epath.Path(model_dir) / FOLDER
    if not folder.exists():
        return []
    # Not by Orbax's manager, which takes seconds to import, and lists unfinished ones too.
    return sorted(
        int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / COMMITTED).exists()
    )


def copy_vocabulary(model_dir: str, path: str) -> None:
    """Copy the vocabulary into MODEL_DIR as one file, so that the folder is all a user needs."""
    source, target = epath.Path(path), epath.Path(model_dir) / VOCABULARY
    # The vocabulary of a resumed run is often the copy that its first start made.
    if source.exists() and source != target:
        if byte_level_bpe.recognizes(source):  # two or three files
            write_atomic(target, byte_level_bpe.read(source).tokenizer_json())
        else:
            write_atomic(target, source.read_bytes())


def abstract_like(abstract: Any, shardings: Any) -> Any:
    """Return `abstract` (shapes and types) with the sharding that each array is restored to."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def _check(saver, step: int, abstract: Any, description: dict[str, Any]) -> None:
    """Raise UserError at the first difference between a checkpoint and what is wanted."""
    where = f"checkpoint {saver.directory}/{step}"
    metadata = saver.item_metadata(step)["state"]
    if metadata is None:
        raise UserError(f"{where} is incomplete: it holds no arrays")
    found = {path: tuple(leaf.shape) for path, leaf in flat(metadata).items()}
    check_saved(where, _read_json(saver, step, "description"), found, abstract, description)


def check_saved(
    where: str,
    saved: Mapping[str, Any],
    found: Mapping[Path, tuple[int, ...]],
    abstract: Any,
    description: Mapping[str, Any],
) -> None:
    """Raise UserError at the first difference between a checkpoint's content and `abstract`.

    `saved` is the checkpoint's description, `found` has its shapes by path. `description` is that
    of the model which is to have its arrays.
    """
    check_same_vocabulary(where, saved.get("vocabulary"), description.get("vocabulary"))
    check_network(where, saved, description)
    check_shapes(where, found, {path: tuple(leaf.shape) for path, leaf in flat(abstract).items()})


def find_unreadable(model_dir: epath.PathLike, step: int) -> str | None:
    """Return why the arrays of a checkpoint without checksums cannot be read, or None.

    Reads every array once, one at a time, so that memory holds the largest of them.
    """
    import orbax.checkpoint as ocp

    with manager(model_dir, read_only=True) as saver, ocp.PyTreeCheckpointer() as reader:
        target = epath.Path(saver.directory) / str(step) / "state"
        metadata = saver.item_metadata(step)["state"]
        if metadata is None:
            return "it cannot be read: it holds no arrays"
        for path, subtree in _subtrees(metadata):
            wanted = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), subtree)
            for name in reversed(path):
                wanted = {name: wanted}
            # As numpy arrays: no device need exist as it did when the checkpoint was saved.
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True)
            try:
                with one_line_errors(f"checkpoint {saver.directory}/{step} cannot be read"):
                    reader.restore(target, args=args)
            except UserError as error:
                return str(error)
    return None


def _subtrees(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, subtree) of everything below nested dicts, which Orbax can restore in part."""
    if isinstance(tree, dict):
        for name, inner in tree.items():
            yield from _subtrees(inner, (*path, name))
    else:
        yield path, tree


def _read_json(saver, step: int, item: str) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    return saver.restore(step, args=args)[item] or {}  # Orbax returns None for an empty dict


@contextlib.contextmanager
def one_line_errors(problem: str) -> Iterator[None]:
    """Turn errors of Orbax, TensorStore and the system into a UserError "`problem`: first line"."""
    # Their texts print whole trees of arrays, or stacks of C++.
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        # TensorStore appends the whole spec of the array.
        first = first.partition(" [tensorstore_spec=")[0]
        raise UserError(f"{problem}: {first}") from error


def remove_unfinished(folder: epath.Path) -> None:
    """Remove the checkpoints in `folder` that a failed or killed save has left."""
    for partial in folder.glob(f"*{integrity.PARTIAL}*"):
        partial.rmtree()


def quiet_orbax() -> None:
    """Suppress the stacks that threads of Orbax print for errors that are raised here too."""
    for name in ("absl", "concurrent.futures", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_orbax)
    sys.unraisablehook = _show_unraisable


def _show_unraisable(report, show=sys.unraisablehook) -> None:
    # When one write of TensorStore's has failed, its other writes return to a loop that is closed.
    if str(report.exc_value) != "Event loop is closed":
        show(report)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    if record.name == "absl":
        return f"{os.sep}orbax{os.sep}" not in record.pathname
    text = record.getMessage()
    return "exception calling callback" not in text and "never retrieved" not in text
