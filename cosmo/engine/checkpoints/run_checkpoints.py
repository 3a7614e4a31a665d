"""Orbax checkpoints of a run: MODEL_DIR/checkpoints/STEP, saved in the background.

Beside the arrays each holds a small JSON description (network, vocabulary), so that a checkpoint of
another model or vocabulary is refused with the difference named, not with a stack trace. Those of
T5X and HuggingFace are found here (`locate`) and read by `cosmo.engine.checkpoints.interop`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.writer import is_remote
from cosmo.engine.checkpoints.description import check_network

FOLDER = "checkpoints"
BEST = "best"  # beside it, of a run with early stopping: a file with the best step's number
COMMITTED = "commit_success.txt"  # Orbax's mark of a finished checkpoint
VOCABULARY = "vocabulary.model"  # beside it: the SentencePiece model that token ids refer to


@dataclasses.dataclass(frozen=True)
class RestoreConfig:
    """A checkpoint to start from: a run's MODEL_DIR (its latest) or one of its checkpoints, a T5X
    checkpoint, or a HuggingFace folder.

    Parameters and step number are taken; the optimizer starts fresh unless
    `restore_optimizer_state`.
    """

    path: str | None = None
    restore_optimizer_state: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`save_period` in steps (None: at every evaluation), `keep` the newest N (None: all).

    The best one of a run with early stopping is kept besides.

    A save that takes more than `save_timeout` seconds is an error (see `saving.Saver`).
    """

    save_period: int | None = None
    keep: int | None = 3
    restore: RestoreConfig = RestoreConfig()
    save_timeout: int = 1200

    def __post_init__(self):
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise UserError(f"KEEP_CHECKPOINTS={self.keep!r}; give at least 1, or None for all")
        if not isinstance(self.save_timeout, int) or self.save_timeout < 1:
            raise UserError(f"SAVE_TIMEOUT={self.save_timeout!r}; give seconds, at least 1")


CHUNK_BYTES = 64 * 2**20  # of one file chunk: a conversion reads a checkpoint chunk by chunk


class _Kept(NamedTuple):
    """Orbax's question which checkpoints to keep: the newest ones, and the one `best` names."""

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
    """An Orbax CheckpointManager over MODEL_DIR/checkpoints."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(keep, best),
        create=not read_only,
        enable_async_checkpointing=True,
        read_only=read_only,
        async_options=async_options,
    )
    return ocp.CheckpointManager(
        epath.Path(model_dir).resolve() / FOLDER,
        options=options,
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "description": ocp.JsonCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        },
    )


def start_saving(manager, step: int, state: Any, description: Any, progress: Any) -> None:
    """Start writing `state`; training goes through `saving.Saver`, which hears of failures."""
    import orbax.checkpoint as ocp

    def chunked(array):
        # A stack of layers is cut into layers; along `shard_axes` Orbax cuts down to single rows.
        stack = array.ndim > 2 and array.nbytes > CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stack else ())

    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state, jax.tree.map(chunked, state)),
            description=ocp.args.JsonSave(description),
            progress=ocp.args.JsonSave(progress or {}),
        ),
        force=True,  # whether to save is decided by the caller
    )


def progress(saver, step: int) -> dict[str, Any]:
    """What `save` was given as `progress`; empty where there is none (imported checkpoints)."""
    import orbax.checkpoint as ocp

    if not (epath.Path(saver.directory) / str(step) / "progress").exists():
        return {}
    restored = saver.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
    return restored["progress"] or {}


def restore(saver, step: int, abstract: Any, description: dict[str, Any]) -> Any:
    """The state saved at `step`, laid out as `abstract` (ShapeDtypeStructs with shardings) says.

    Raises UserError if vocabulary or shapes are not those of this run.
    """
    import orbax.checkpoint as ocp

    where = f"{saver.directory}/{step}"
    check(saver, step, abstract, description)
    try:
        restored = saver.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {where} cannot be read: {_first_line(error)}") from error
    return restored["state"]


def check(saver, step: int, abstract: Any, description: dict[str, Any]) -> None:
    """Raise UserError naming the first difference between a checkpoint and what is wanted."""
    where = f"{saver.directory}/{step}"
    saved = _description(saver, step)
    ours, theirs = description.get("vocabulary"), saved.get("vocabulary")
    if ours and theirs and ours["fingerprint"] != theirs["fingerprint"]:
        raise UserError(
            f"vocabulary mismatch: {where} was trained with {theirs['path']} ({theirs['size']} "
            f"pieces), this run has {ours['path']} ({ours['size']} pieces); every token id would "
            "mean another word",
            setting="VOCABULARY_PATH",
        )
    check_network(where, saved, description)
    metadata = saver.item_metadata(step)["state"]
    if metadata is None:
        raise UserError(f"checkpoint {where} is incomplete: it holds no arrays")
    found = {_path(p): tuple(m.shape) for p, m in jax.tree_util.tree_leaves_with_path(metadata)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = _path(path)
        if name not in found:
            raise UserError(f"checkpoint {where} has no {name}: of another model or optimizer")
        if found[name] != tuple(leaf.shape):
            raise UserError(
                f"checkpoint {where} is of another model size: {name} is {found[name]} there and "
                f"{tuple(leaf.shape)} here",
                setting="MODEL",
            )


def keep_vocabulary(model_dir: str, path: str) -> None:
    """Copy the vocabulary's file into MODEL_DIR, so that the folder says all about its model."""
    source, target = epath.Path(path), epath.Path(model_dir) / VOCABULARY
    if not source.exists() or source == target:
        return
    partial = target if is_remote(target) else target.parent / f".{VOCABULARY}.partial"
    try:
        partial.write_bytes(source.read_bytes())
        if partial != target:
            partial.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def completed_steps(model_dir: str) -> list[int]:
    """Steps with a finished checkpoint, ascending: Orbax marks them with a file of their own."""
    folder = epath.Path(model_dir) / FOLDER
    if not folder.exists():
        return []
    return sorted(
        int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / COMMITTED).exists()
    )


def abstract_like(abstract: Any, shardings: Any) -> Any:
    """Shapes and types with the sharding that each array is to be restored to."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def _description(saver, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    restored = saver.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
    return restored["description"] or {}


def _path(path) -> str:
    keys = (getattr(e, "key", getattr(e, "name", getattr(e, "idx", None))) for e in path)
    return "/".join(str(key) for key in keys)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
