"""Locate, open and restore any checkpoint: ours, T5X's, HuggingFace's, ParlAI's.

`locate` finds the format, `open_source` gives lazy arrays under our names, and the functions
`restore_*` load them, each device reading only its own part.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from cosmo.engine.base import byte_level_bpe, hub
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.files import is_remote
from cosmo.engine.checkpoints import integrity, run_checkpoints, streaming
from cosmo.engine.checkpoints.description import (
    Path,
    check_network,
    check_same_vocabulary,
    check_shapes,
    describe,
    flat,
)
from cosmo.engine.checkpoints.interop import (
    ctranslate2_folder,
    huggingface,
    parlai,
    t5x,
    t5x_adafactor,
    tokenizer,
    torch_file,
)
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model import models
from cosmo.engine.model.blenderbot import BlenderbotConfig
from cosmo.engine.model.t5 import T5Config

log = logging.getLogger(__name__)

FORMAT_NAMES = {
    "cosmo": "checkpoint",
    "t5x": "T5X checkpoint",
    "huggingface": "HuggingFace folder",
    "parlai": "ParlAI model",
    "ctranslate2": "CTranslate2 folder",
}
SETTINGS = ("MODEL_DIR", "CHECKPOINT_PATH", "INITIAL_CHECKPOINT_PATH")  # that name a checkpoint
NETWORKS = {"T5Config": T5Config, "BlenderbotConfig": BlenderbotConfig}  # by a description's name
# Threads overlap their waits for a bucket. Only a few: each holds a parameter in memory.
READ_THREADS = 4
# Where a path without a checkpoint is looked around: a hub's cache has HOME/hub/MODEL/snapshots/ID.
LEVELS_ABOVE, LEVELS_BELOW, MAX_FOLDERS_SEARCHED = 3, 4, 500
CHECKPOINTS_SHOWN = 3  # in an error


class Located(NamedTuple):
    """A checkpoint that was found. The folder of one of ours is its MODEL_DIR.

    ParlAI's is no folder, but the file of the model.
    """

    folder: str
    step: int
    format: str  # a key of FORMAT_NAMES


def locate(path: str) -> Located:
    """Return the checkpoint at `path`, in whichever of the five formats.

    `path` is a run's folder, one checkpoint in it or MODEL_DIR/best; one T5X checkpoint or the
    folder over several (the latest); a HuggingFace folder; a ParlAI model; or a CTranslate2
    folder. An hf:// path is downloaded first.
    Raises UserError if there is none, or if it is damaged.
    """
    if not path:  # such as --checkpoint=$RUN where RUN is not set: it would be the working folder
        raise UserError("no checkpoint: its path is empty", setting=SETTINGS)
    path = hub.local(path)
    folder = epath.Path(path)
    if not folder.exists():
        raise UserError(f"no checkpoint at {path}: it does not exist")
    if not folder.is_dir() and folder.name != run_checkpoints.BEST:
        if model := parlai.model_file(folder):
            return Located(model, 0, "parlai")
        if torch_file.is_torch_file(folder):
            raise UserError(
                f"no checkpoint at {path}: it is a file of torch's without the options of a ParlAI "
                f"model, {folder.name}{parlai.OPTIONS} beside it: copy that file too"
            )
        raise UserError(f"no checkpoint at {path}: it is a file; {_where_else(folder)}")
    # Ours first: a run's folder may also hold checkpoints that were exported to T5X.
    ours = run_checkpoints.locate(path)
    if ours is not None:
        return Located(*ours, "cosmo")
    if t5x.is_checkpoint(folder):
        return Located(path, t5x.step_of(path), "t5x")
    steps = t5x.checkpoints_in(folder)
    if steps:
        return Located(str(folder / f"checkpoint_{max(steps)}"), max(steps), "t5x")
    if ctranslate2_folder.is_folder(folder):
        return Located(path, ctranslate2_folder.read_description(path)["step"], "ctranslate2")
    if huggingface.is_checkpoint(folder):
        return Located(path, 0, "huggingface")  # that format stores no step
    # ParlAI's number of updates is no step here: a run counts from the model that it starts from.
    if model := parlai.model_file(folder):
        return Located(model, 0, "parlai")
    raise UserError(
        f"no checkpoint in {path}: looked for {run_checkpoints.FOLDER}/STEP (ours), "
        f"checkpoint_STEP/{t5x.INDEX} or {t5x.STATE} (T5X), {huggingface.CONFIG} (HuggingFace) and "
        f"{parlai.USUAL_NAME}{parlai.OPTIONS} (ParlAI); " + _where_else(folder),
        setting=SETTINGS,
    )


def _where_else(folder: epath.Path) -> str:
    """Return the remedy for a path without a checkpoint: those around it, if there are any."""
    # One level too low: MODEL_DIR/checkpoints, a file of a checkpoint, or a part of one.
    for above in list(folder.parents)[:LEVELS_ABOVE]:
        if _looks_like_checkpoint(above):
            return f"give the folder {above}, which holds this one"
    # One level too high: a Trainer's output, a hub's cache, a folder of several runs.
    below = sorted(str(found) for found in _checkpoints_below(folder))
    if not below:
        return "give another folder"
    more = f" and {len(below) - CHECKPOINTS_SHOWN} more" if len(below) > CHECKPOINTS_SHOWN else ""
    return f"below it there are {', '.join(below[:CHECKPOINTS_SHOWN])}{more}: give one of them"


def _checkpoints_below(folder: epath.Path) -> list[epath.Path]:
    """Return the folders below `folder` that look like checkpoints, breadth first."""
    found: list[epath.Path] = []
    # Not in a bucket, where each folder costs a request; nor far, as `/` may be given.
    left = [] if is_remote(folder) else [(folder, 0)]
    looked_at = 0
    while left and looked_at < MAX_FOLDERS_SEARCHED:
        place, depth = left.pop(0)
        looked_at += 1
        if depth and _looks_like_checkpoint(place):
            found.append(place)
        elif depth < LEVELS_BELOW:
            with contextlib.suppress(OSError):  # a folder that cannot be read
                left += [(p, depth + 1) for p in sorted(place.iterdir()) if p.is_dir()]
    return found


def _looks_like_checkpoint(folder: epath.Path) -> bool:
    """Return whether `locate` would look further into `folder`. Reads no file."""
    if integrity.PARTIAL in folder.name:  # no remedy: it was never finished
        return False
    try:
        return bool(
            run_checkpoints.completed_steps(folder)
            or t5x.is_checkpoint(folder)
            or (huggingface.is_checkpoint(folder) and any(folder.glob("*.safetensors")))
            or (folder / f"{parlai.USUAL_NAME}{parlai.OPTIONS}").exists()
            or ctranslate2_folder.is_folder(folder)
        )
    except OSError:
        return False


def results_folder(path: str, name: str, setting: str) -> str:
    """Return the default folder for results: `name` in the run's folder.

    Raises UserError for a foreign checkpoint: its folder belongs to another system.
    """
    found = locate(path)
    if found.format != "cosmo":
        raise UserError(f"{path} is no run of ours to write into: give a folder", setting=setting)
    return f"{found.folder}/{name}"


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint. Nothing large is in memory.

    `params` maps our paths, such as ("encoder", "layers", "mlp", "wo"), to arrays. `others` maps
    the format's own names to its remaining arrays, those of the optimizer's state.
    `text_options` are ParlAI's options on the form of texts: of its models, and of checkpoints
    imported from them.
    """

    format: str  # a key of FORMAT_NAMES
    path: str
    step: int
    network: T5Config | BlenderbotConfig
    params: dict[Path, LazyArray]
    description: dict[str, Any]
    others: dict[Any, LazyArray]
    text_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{FORMAT_NAMES[self.format]} {self.path}, step {self.step}"

    @property
    def parameter_count(self) -> int:
        """The number of numbers in the parameters."""
        return sum(array.size for array in self.params.values())

    @property
    def vocabulary_path(self) -> str | None:
        """The vocabulary kept with the checkpoint, or the one that its run used."""
        if self.format == "parlai":
            return parlai.vocabulary_path(self.path)
        exported = self.format in ("huggingface", "ctranslate2")
        name = tokenizer.SPIECE if exported else run_checkpoints.VOCABULARY
        folder = epath.Path(self.path)
        # A T5X folder is one checkpoint; one vocabulary for all of them is in the folder above.
        for place in (folder, folder.parent) if self.format == "t5x" else (folder,):
            if (place / name).exists():
                return str(place / name)
        if self.format == "huggingface" and isinstance(self.network, BlenderbotConfig):
            return byte_level_bpe.find(folder)
        return self.description.get("vocabulary", {}).get("path")


def open_source(path: str, format: str | None = None, *, allow_nonfinite: bool = False) -> Source:
    """Open the checkpoint at `path`.

    Raises UserError if there is none, if it is of another `format`, or if its tensors
    are not those of a T5 or BlenderBot. Reading a foreign parameter with NaN or infinity raises
    UserError too, unless `allow_nonfinite`.
    """
    folder, step, found = locate(path)
    if format is not None and format != found:
        raise UserError(f"{path} is a {FORMAT_NAMES[found]}, not a {FORMAT_NAMES[format]}")
    if found == "ctranslate2":
        raise UserError(
            f"{path} is a CTranslate2 folder: it can answer, and its weights are not read here; "
            "give the checkpoint that it was exported from",
            setting=SETTINGS,
        )
    description: dict[str, Any] = {}
    others: dict[Any, LazyArray] = {}
    text_options: dict[str, Any] = {}
    if found == "t5x":
        _, arrays = t5x.open_checkpoint(folder)
        network = t5x.network(folder, arrays)
        params = t5x.read_params(folder, arrays, network, allow_nonfinite=allow_nonfinite)
        others = {name: array for name, array in arrays.items() if name.startswith("state/")}
    elif found == "huggingface":
        config, tensors = huggingface.open_checkpoint(folder)
        network = huggingface.network(folder, config, tensors)
        description = huggingface.describe(folder, config)
        params = huggingface.read_params(folder, tensors, network, allow_nonfinite=allow_nonfinite)
    elif found == "parlai":
        options, tensors = parlai.open_checkpoint(folder)
        network = parlai.network(folder, options, tensors)
        params = parlai.read_params(folder, tensors, network, allow_nonfinite=allow_nonfinite)
        text_options = parlai.text_options(options)
    else:
        arrays, description = streaming.read_checkpoint(folder, step)
        network = network_of(path, description)
        params = {path[1:]: array for path, array in arrays.items() if path[0] == "params"}
        others = {path: array for path, array in arrays.items() if path[0] == "opt_state"}
        imported_from = description.get("imported_from")
        if isinstance(imported_from, dict) and isinstance(imported_from.get("text_options"), dict):
            text_options = parlai.text_options(imported_from["text_options"])
    return Source(found, folder, step, network, params, description, others, text_options)


def network_of(path: str, description: Mapping[str, Any]) -> T5Config | BlenderbotConfig:
    """Return the network that `description.describe` described. Raises UserError."""
    name = description.get("network")
    if name not in NETWORKS:
        raise UserError(f"{path} holds a {name}, expected one of {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](**description["config"])
    # A later version's network may have fields that this version does not know.
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: its description has an unknown network: {error}") from error


def read_numpy(path: str) -> tuple[int, dict[str, Any]]:
    """Return (step, state) of our checkpoint at `path`, as nested dicts of numpy arrays.

    The state is {"step", "params", "opt_state"}. Lists in it are dicts with keys "0", "1", ...
    No JAX device is used. Raises UserError if the checkpoint is not ours or cannot be read.
    """
    found = locate(path)
    if found.format != "cosmo":
        raise UserError(f"{path} is no checkpoint of ours: `python -m cosmo import` makes it one")
    # TensorStore alone reads it: no device need exist.
    arrays, _ = streaming.read_checkpoint(found.folder, found.step)
    whole = {path: array.whole() for path, array in arrays.items()}
    return found.step, traverse_util.unflatten_dict(whole)


def restore_params(path: str, abstract: Any, shardings: Any, description: dict[str, Any]):
    """Return (step, parameters) of the checkpoint at `path`, without its optimizer state.

    Parameters of other formats are converted on the way. Raises UserError if the checkpoint
    is of another model or vocabulary than `abstract` and `description`.
    """
    source = open_source(path)
    if source.format == "cosmo":
        where = f"checkpoint {source.path}/{run_checkpoints.FOLDER}/{source.step}"
        found = {("params", *path): array.shape for path, array in source.params.items()}
        wanted = {"params": abstract}
        run_checkpoints.check_saved(where, source.description, found, wanted, description)
    else:
        _check(source, abstract, description)
        log.info("%s: converted to our names", source)
    leaves = [source.params[path] for path in flat(abstract)]  # in JAX's order
    arrays = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return source.step, _load(arrays, abstract, shardings)


def restore_adafactor(
    path: str, abstract_params: Any, abstract: Any, shardings: Any, description: dict[str, Any]
) -> Any:
    """Return the optimizer state of a T5X checkpoint on the devices, shaped as `abstract` (ours).

    Raises UserError if it is no T5X checkpoint, or its Adafactor differs from ours.
    """
    source = open_source(path)
    _check(source, abstract_params, description)
    return _load(read_adafactor(source, abstract), abstract, shardings)


def read_adafactor(source: Source, abstract: Any) -> Any:
    """Return the optimizer state of a T5X checkpoint as LazyArrays, shaped as `abstract` (ours).

    Raises UserError if it is no T5X checkpoint, or its Adafactor differs from ours.
    """
    if source.format != "t5x":
        raise UserError(
            f"{source} has no optimizer state: leave out",
            setting=("RESTORE_OPTIMIZER_STATE", "optimizer_state"),
        )
    return t5x_adafactor.read_state(
        source.path, source.others, source.network, source.step, abstract
    )


def _check(source: Source, abstract: Any, description: dict[str, Any]) -> None:
    """Raise UserError if a foreign checkpoint is of another model or vocabulary."""
    # Shapes first: their error is clearer than that of a field of the network.
    found = {path: array.shape for path, array in source.params.items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in flat(abstract).items()}
    check_shapes(str(source), found, wanted)
    # A parameter that is left over would silently not be used.
    surplus = found.keys() - wanted.keys()
    if surplus:
        raise UserError(f"{source} has {'/'.join(min(surplus))}, this gin file's model has not")
    # Equal shapes are not enough: see `description.BEHAVIOUR`.
    saved = describe(models.EncoderDecoderModel(source.network), None)
    check_network(str(source), saved, description)
    check_own_vocabulary(source, description.get("vocabulary"))


def check_own_vocabulary(source: Source, wanted: dict[str, Any] | None) -> None:
    """Raise UserError if a foreign checkpoint has its own vocabulary and it is not `wanted`.

    `wanted` is {"path", "fingerprint"}, or None if this run has none.
    """
    # A T5X checkpoint does not record its vocabulary.
    own = source.vocabulary_path
    name = source.description.get("byte_tokenizer")
    if name and wanted:
        raise UserError(
            f"{source}: {huggingface.BYTES.format(tokenizer=name)}, and {wanted['path']} is of "
            "another model"
        )
    if source.format in ("huggingface", "parlai") and own and wanted:
        saved = {"path": own, "fingerprint": tokenizer.fingerprint(own)}
        check_same_vocabulary(str(source), saved, wanted)


def _load(arrays: Any, abstract: Any, shardings: Any) -> Any:
    """Return a tree of LazyArrays as device arrays. Each device reads its own part."""

    def load(array: LazyArray, wanted, sharding) -> jax.Array:
        def part(index):
            # JAX gives slice(None) for an axis that is not cut; a LazyArray needs both ends.
            whole = zip(index, array.shape, strict=True)
            index = tuple(slice(*s.indices(size)[:2]) for s, size in whole)
            return np.asarray(array.read(index), wanted.dtype)

        # JAX calls `part` for this process's devices only: no process reads the whole array.
        return jax.make_array_from_callback(array.shape, sharding, part)

    leaves, structure = jax.tree.flatten(arrays)
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
        loaded = pool.map(load, leaves, jax.tree.leaves(abstract), jax.tree.leaves(shardings))
        return jax.tree.unflatten(structure, list(loaded))
