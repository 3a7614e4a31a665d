"""Orbax checkpoints of a run: MODEL_DIR/checkpoints/STEP, saved in the background.

Beside the arrays each holds a small JSON description (network, vocabulary), so that a checkpoint of
another model or vocabulary is refused with the difference named, not with a stack trace. Those of
T5X and HuggingFace are found here (`locate`) and read by `cosmo.engine.checkpoints.interop`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import integrity
from cosmo.engine.train.writer import is_remote, log

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


# Fields of a network's config that change what it computes, but no shape.
BEHAVIOUR = (
    "num_heads",
    "mlp_activations",
    "relative_attention_max_distance",
    "scale_decoder_outputs",
)
CHUNK_BYTES = 64 * 2**20  # of one file chunk: a conversion reads a checkpoint chunk by chunk


class Located(NamedTuple):
    """A checkpoint that was found: its folder (of ours, MODEL_DIR), step and format."""

    folder: str
    step: int
    format: str  # "cosmo", "t5x" or "huggingface"


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
            "mean another word (gin: VOCABULARY_PATH)"
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
                f"{tuple(leaf.shape)} here (gin: MODEL, or the gin file of the model)"
            )


def check_network(where: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError if two descriptions of a network with equal shapes compute differently."""
    saved, wanted = saved.get("config", {}), wanted.get("config", {})

    def value(config, name):
        # T5Config's default: tied logits are scaled, others are not.
        if name == "scale_decoder_outputs" and config.get(name) is None:
            return config.get("logits_via_embedding")
        return config.get(name)

    for name in BEHAVIOUR:
        theirs, ours = value(saved, name), value(wanted, name)
        if None not in (theirs, ours) and theirs != ours:
            raise UserError(
                f"checkpoint {where} is of another network: {name} is {theirs} there and {ours} "
                "here (gin: the gin file of the model)"
            )


def locate(path: str) -> Located:
    """The checkpoint at `path`, in whichever of the three formats.

    Ours is a run's folder (its latest sound checkpoint), one checkpoint in it or MODEL_DIR/best,
    which names one; T5X's is one checkpoint or the folder over several (the latest). Raises
    UserError if there is none, or if the one that is named is damaged.
    """
    from cosmo.engine.checkpoints.interop import huggingface, t5x

    folder = epath.Path(path)
    if not folder.exists():
        raise UserError(f"no checkpoint at {path}: it does not exist")
    if folder.name == BEST and not folder.is_dir():
        folder = folder.parent / FOLDER / folder.read_text().strip()
        if not folder.exists():
            raise UserError(f"{path} names {folder}, which is not there any more")
    ours = folder.name.isdigit() and folder.parent.name == FOLDER
    if ours:
        if not (folder / COMMITTED).exists():
            raise UserError(f"checkpoint {path} was not finished: it has no {COMMITTED}")
        found = _problem(folder)
        if found:
            raise UserError(f"checkpoint {path} is damaged: {found}; give another one of the run's")
        return Located(str(folder.parent.parent), int(folder.name), "cosmo")
    steps = completed_steps(path)
    for step in reversed(steps):
        found = _problem(folder / FOLDER / str(step))
        if not found:
            return Located(path, step, "cosmo")
        log.warning("checkpoint %s/%s/%d is damaged and not used: %s", path, FOLDER, step, found)
    if steps:
        raise UserError(f"every checkpoint in {path} is damaged, the newest one: {found}")
    if t5x.is_checkpoint(folder):
        return Located(path, t5x.step_of(path), "t5x")
    below = sorted(t5x.checkpoints_in(folder))
    if below:
        return Located(str(folder / f"checkpoint_{below[-1]}"), below[-1], "t5x")
    if huggingface.is_checkpoint(folder):
        return Located(path, 0, "huggingface")
    raise UserError(
        f"no checkpoint in {path}: looked for {FOLDER}/STEP (ours), checkpoint_STEP/{t5x.INDEX} "
        f"(T5X) and {huggingface.CONFIG} (HuggingFace); give another folder "
        "(gin: MODEL_DIR, CHECKPOINT_PATH or INITIAL_CHECKPOINT_PATH)"
    )


def _problem(folder: epath.Path) -> str | None:
    """`integrity.problem`, read once a process for as long as no file changes."""
    if is_remote(folder):
        return _problem_of(str(folder))
    files = sorted(pathlib.Path(folder).rglob("*"))
    return _problem_of(str(folder), *((f.name, f.stat().st_mtime_ns) for f in files))


@functools.lru_cache(maxsize=64)
def _problem_of(folder: str, *_seen: tuple[str, int]) -> str | None:
    return integrity.problem(folder)


def beside(path: str, name: str, flag: str) -> str:
    """Where results go by default: a folder in the run's own; a foreign checkpoint has none."""
    found = locate(path)
    if found.format != "cosmo":
        raise UserError(f"{path} is no run of ours to write into: give {flag}=FOLDER")
    return f"{found.folder}/{name}"


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


def restore_params(path: str, abstract: Any, shardings: Any, description: dict[str, Any]):
    """(step, parameters) of the checkpoint at `path`, without its optimizer state.

    T5X's and HuggingFace's are converted on the way.
    """
    import orbax.checkpoint as ocp

    model_dir, step, format = locate(path)
    if format != "cosmo":
        from cosmo.engine.checkpoints.interop import sources

        return step, sources.restore_params(path, abstract, shardings, description)
    wanted = {"params": abstract_like(abstract, shardings)}
    with manager(model_dir, read_only=True) as saver:
        check(saver, step, wanted, description)
    target = epath.Path(model_dir).resolve() / FOLDER / str(step) / "state"
    try:
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                target,
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"checkpoint {target.parent} cannot be read: {_first_line(error)}"
        ) from error
    return step, restored["params"]


def read_numpy(path: str) -> tuple[int, dict[str, Any]]:
    """(step, state) of our checkpoint at `path` as nested dicts of numpy arrays.

    The state is {"step", "params", "opt_state"}; no device is used, nor need there be one. Lists
    of Orbax's are dicts with keys "0", "1", ... here. Raises UserError if it cannot be read.
    """
    from cosmo.engine.checkpoints.interop import orbax

    found = locate(path)
    if found.format != "cosmo":
        raise UserError(f"{path} is no checkpoint of ours: `python -m cosmo import` makes it one")
    arrays, _ = orbax.read(found.folder, found.step)
    state: dict[str, Any] = {}
    for names, array in arrays.items():
        inner = state
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = array.whole()
    return found.step, state


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
