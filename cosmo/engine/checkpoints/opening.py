"""A checkpoint of any format, opened: what its network is, and its arrays under our names."""

import concurrent.futures
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.writer import is_remote, log
from cosmo.engine.checkpoints import integrity, run_checkpoints, streaming
from cosmo.engine.checkpoints.description import check_network, describe
from cosmo.engine.checkpoints.interop import huggingface, t5x, t5x_adafactor, tokenizer
from cosmo.engine.checkpoints.interop.names import flat
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.checkpoints.run_checkpoints import _first_line
from cosmo.engine.checkpoints.streaming import Path
from cosmo.engine.model import models, t5

NAMES = {"cosmo": "checkpoint", "t5x": "T5X checkpoint", "huggingface": "HuggingFace folder"}


class Located(NamedTuple):
    """A checkpoint that was found: its folder (of ours, MODEL_DIR), step and format."""

    folder: str
    step: int
    format: str  # "cosmo", "t5x" or "huggingface"


def locate(path: str) -> Located:
    """The checkpoint at `path`, in whichever of the three formats.

    Ours is a run's folder (its latest sound checkpoint), one checkpoint in it or MODEL_DIR/best,
    which names one; T5X's is one checkpoint or the folder over several (the latest). Raises
    UserError if there is none, or if the one that is named is damaged.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise UserError(f"no checkpoint at {path}: it does not exist")
    if folder.name == run_checkpoints.BEST and not folder.is_dir():
        folder = folder.parent / run_checkpoints.FOLDER / folder.read_text().strip()
        if not folder.exists():
            raise UserError(f"{path} names {folder}, which is not there any more")
    ours = folder.name.isdigit() and folder.parent.name == run_checkpoints.FOLDER
    if ours:
        if not (folder / run_checkpoints.COMMITTED).exists():
            raise UserError(
                f"checkpoint {path} was not finished: it has no {run_checkpoints.COMMITTED}"
            )
        found = _problem(folder)
        if found:
            raise UserError(f"checkpoint {path} is damaged: {found}; give another one of the run's")
        return Located(str(folder.parent.parent), int(folder.name), "cosmo")
    steps = run_checkpoints.completed_steps(path)
    for step in reversed(steps):
        found = _problem(folder / run_checkpoints.FOLDER / str(step))
        if not found:
            return Located(path, step, "cosmo")
        log.warning(
            "checkpoint %s/%s/%d is damaged and not used: %s",
            path,
            run_checkpoints.FOLDER,
            step,
            found,
        )
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
        f"no checkpoint in {path}: looked for {run_checkpoints.FOLDER}/STEP (ours), checkpoint_STEP/{t5x.INDEX} "
        f"(T5X) and {huggingface.CONFIG} (HuggingFace); give another folder",
        setting=("MODEL_DIR", "CHECKPOINT_PATH", "INITIAL_CHECKPOINT_PATH"),
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


def restore_params(path: str, abstract: Any, shardings: Any, description: dict[str, Any]):
    """(step, parameters) of the checkpoint at `path`, without its optimizer state.

    T5X's and HuggingFace's are converted on the way.
    """
    import orbax.checkpoint as ocp

    model_dir, step, format = locate(path)
    if format != "cosmo":
        return step, _restore_foreign(path, abstract, shardings, description)
    wanted = {"params": run_checkpoints.abstract_like(abstract, shardings)}
    with run_checkpoints.manager(model_dir, read_only=True) as saver:
        run_checkpoints.check(saver, step, wanted, description)
    target = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER / str(step) / "state"
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
    found = locate(path)
    if found.format != "cosmo":
        raise UserError(f"{path} is no checkpoint of ours: `python -m cosmo import` makes it one")
    arrays, _ = streaming.read(found.folder, found.step)
    state: dict[str, Any] = {}
    for names, array in arrays.items():
        inner = state
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = array.whole()
    return found.step, state


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint; nothing large is in memory.

    `params` maps our paths, such as ("encoder", "layers", "mlp", "wo"), to arrays; `others` are the
    format's own remaining arrays (the optimizer's state), by its own names.
    """

    format: str  # "cosmo", "t5x" or "huggingface"
    path: str
    step: int
    network: t5.T5Config
    params: dict[Path, LazyArray]
    description: dict[str, Any]
    others: dict[Any, LazyArray]

    def __str__(self) -> str:
        return f"{NAMES[self.format]} {self.path}, step {self.step}"

    @property
    def vocabulary_path(self) -> str | None:
        """The SentencePiece model that is kept with the checkpoint, or that its run names."""
        name = tokenizer.SPIECE if self.format == "huggingface" else run_checkpoints.VOCABULARY
        folder = epath.Path(self.path)
        # T5X's folder is one checkpoint; what belongs to all of them lies beside it.
        for place in (folder, folder.parent) if self.format == "t5x" else (folder,):
            if (place / name).exists():
                return str(place / name)
        return self.description.get("vocabulary", {}).get("path")


def open_source(path: str, format: str | None = None) -> Source:
    """Open the checkpoint at `path`; UserError if it is none, or not of `format` where given."""
    folder, step, found = locate(path)
    if format is not None and format != found:
        raise UserError(f"{path} is a {NAMES[found]}, not a {NAMES[format]}")
    if found == "t5x":
        _, arrays = t5x.open_checkpoint(folder)
        network = t5x.network(folder, arrays)
        params, description = t5x.read(folder, arrays, network), {}
        others = {name: array for name, array in arrays.items() if name.startswith("state/")}
    elif found == "huggingface":
        config, tensors = huggingface.open_checkpoint(folder)
        network = huggingface.network(folder, config, tensors)
        params, description, others = huggingface.read(folder, tensors, network), {}, {}
    else:
        arrays, description = streaming.read(folder, step)
        if description.get("network") != "T5Config":
            raise UserError(f"{path} holds a {description.get('network')}, expected a T5Config")
        try:
            network = t5.T5Config(**description["config"])
        except TypeError as error:
            raise UserError(f"{path}: its description has an unknown network: {error}") from error
        params = {path[1:]: array for path, array in arrays.items() if path[0] == "params"}
        others = {path: array for path, array in arrays.items() if path[0] == "opt_state"}
    return Source(found, folder, step, network, params, description, others)


def _restore_foreign(path: str, abstract: Any, shardings: Any, description: dict[str, Any]) -> Any:
    """Parameters like `abstract` from any checkpoint, each device reading its own part."""
    source = open_source(path)
    _check(source, abstract, description)
    log.info("%s: read as ours", source)
    return _load(_tree(source.params, abstract), abstract, shardings)


def restore_adafactor(
    path: str, abstract_params: Any, abstract: Any, shardings: Any, description: dict[str, Any]
) -> Any:
    """The optimizer state like `abstract` of a T5X checkpoint: training goes on as T5X's would."""
    source = open_source(path)
    _check(source, abstract_params, description)
    if source.format != "t5x":
        raise UserError(
            f"{source} has no optimizer state to go on with", setting="RESTORE_OPTIMIZER_STATE"
        )
    states = t5x_adafactor.read(source.path, source.others, source.network, source.step, abstract)
    return _load(states, abstract, shardings)


def _check(source: Source, abstract: Any, description: dict[str, Any]) -> None:
    wanted = {path: tuple(leaf.shape) for path, leaf in flat(abstract).items()}
    for path, shape in wanted.items():
        name = "/".join(path)
        if path not in source.params:
            raise UserError(f"{source} has no {name}: it is of another model than this gin file's")
        if source.params[path].shape != shape:
            raise UserError(
                f"{source} is of another model size: {name} is {source.params[path].shape} there "
                f"and {shape} here",
                setting="MODEL",
            )
    surplus = source.params.keys() - wanted.keys()
    if surplus:
        raise UserError(f"{source} has {'/'.join(min(surplus))}, this gin file's model has not")
    saved = describe(models.EncoderDecoderModel(source.network), None)
    check_network(source.path, saved, description)
    wanted = description.get("vocabulary")
    if wanted:
        check_pieces(source, wanted["path"], wanted["fingerprint"])


def check_pieces(source: Source, path: str, fingerprint: str) -> None:
    """Raise UserError if a HuggingFace folder's own vocabulary is another one."""
    own = source.vocabulary_path
    if source.format == "huggingface" and own and tokenizer.fingerprint(own) != fingerprint:
        raise UserError(
            f"vocabulary mismatch: {source} has its own, {own}, and this run has {path}; every "
            "token id would mean another word",
            setting="VOCABULARY_PATH",
        )


def _tree(arrays: dict[Path, LazyArray], like: Any) -> Any:
    leaves = [arrays[path] for path in flat(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _load(arrays: Any, abstract: Any, shardings: Any) -> Any:
    def load(array: LazyArray, wanted, sharding) -> jax.Array:
        def part(index):
            whole = zip(index, array.shape, strict=True)
            index = tuple(slice(*s.indices(size)[:2]) for s, size in whole)
            return np.asarray(array.read(index), wanted.dtype)

        return jax.make_array_from_callback(array.shape, sharding, part)

    leaves, structure = jax.tree.flatten(arrays)
    # Threads overlap waiting for a bucket; a few, for each holds a parameter in memory.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loaded = pool.map(load, leaves, jax.tree.leaves(abstract), jax.tree.leaves(shardings))
        return jax.tree.unflatten(structure, list(loaded))


def parameter_count(network: t5.T5Config) -> int:
    """How many parameters a network has."""
    shapes = models.abstract_params(models.EncoderDecoderModel(network))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
