"""A checkpoint of any format, opened: what its network is, and its arrays under our names."""

import concurrent.futures
import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import checkpoints
from cosmo.engine.checkpoints.interop import huggingface, orbax, t5x, t5x_adafactor, tokenizer
from cosmo.engine.checkpoints.interop.lazy import LazyArray
from cosmo.engine.checkpoints.interop.names import flat
from cosmo.engine.checkpoints.interop.orbax import Path
from cosmo.engine.infer import infer
from cosmo.engine.model import models, t5
from cosmo.engine.train.writer import log

NAMES = {"cosmo": "checkpoint", "t5x": "T5X checkpoint", "huggingface": "HuggingFace folder"}


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
        name = tokenizer.SPIECE if self.format == "huggingface" else checkpoints.VOCABULARY
        folder = epath.Path(self.path)
        # T5X's folder is one checkpoint; what belongs to all of them lies beside it.
        for place in (folder, folder.parent) if self.format == "t5x" else (folder,):
            if (place / name).exists():
                return str(place / name)
        return self.description.get("vocabulary", {}).get("path")


def open_source(path: str, format: str | None = None) -> Source:
    """Open the checkpoint at `path`; UserError if it is none, or not of `format` where given."""
    folder, step, found = checkpoints.locate(path)
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
        arrays, description = orbax.read(folder, step)
        if description.get("network") != "T5Config":
            raise UserError(f"{path} holds a {description.get('network')}, expected a T5Config")
        try:
            network = t5.T5Config(**description["config"])
        except TypeError as error:
            raise UserError(f"{path}: its description has an unknown network: {error}") from error
        params = {path[1:]: array for path, array in arrays.items() if path[0] == "params"}
        others = {path: array for path, array in arrays.items() if path[0] == "opt_state"}
    return Source(found, folder, step, network, params, description, others)


def restore_params(path: str, abstract: Any, shardings: Any, description: dict[str, Any]) -> Any:
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
            f"{source} has no optimizer state to go on with (gin: RESTORE_OPTIMIZER_STATE)"
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
                f"and {shape} here (gin: MODEL, or the gin file of the model)"
            )
    surplus = source.params.keys() - wanted.keys()
    if surplus:
        raise UserError(f"{source} has {'/'.join(min(surplus))}, this gin file's model has not")
    saved = infer.describe(models.EncoderDecoderModel(source.network), None)
    checkpoints.check_network(source.path, saved, description)
    wanted = description.get("vocabulary")
    if wanted:
        check_pieces(source, wanted["path"], wanted["fingerprint"])


def check_pieces(source: Source, path: str, fingerprint: str) -> None:
    """Raise UserError if a HuggingFace folder's own vocabulary is another one."""
    own = source.vocabulary_path
    if source.format == "huggingface" and own and tokenizer.fingerprint(own) != fingerprint:
        raise UserError(
            f"vocabulary mismatch: {source} has its own, {own}, and this run has {path}; every "
            "token id would mean another word (gin: VOCABULARY_PATH)"
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
