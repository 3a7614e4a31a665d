"""Our own checkpoints as lazy arrays: read part by part, written part by part.

Training saves and restores whole states (`cosmo.engine.checkpoints.run_checkpoints`); conversions come here, so
that a model larger than memory can pass through.
"""

import contextlib
import json
import logging
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.writer import is_remote
from cosmo.engine.checkpoints import integrity, run_checkpoints
from cosmo.engine.checkpoints.lazy import LazyArray

Path = tuple[str, ...]  # of an array in a state: ("params", "encoder", "layers", "mlp", "wo")


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Teaches Orbax to save a LazyArray: one piece is in memory at a time, and is a chunk."""

    def __init__(self, on_piece: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.on_piece = on_piece

    async def _open_and_write(self, value, tspec, ts_context):
        metadata = {**tspec["metadata"], "chunks": [max(n, 1) for n in value.piece_shape()]}
        spec = ts.Spec({**tspec, "metadata": metadata})
        with explained("cannot write"):
            target = await ts.open(spec, create=True, open=True, context=ts_context)
        for index in value.places():
            # Waiting here, not by await, keeps the arrays of a state from being read all at once.
            piece = value.read(index)
            with explained(f"cannot write {tspec['kvstore'].get('path', '')}"):
                target[index].write(piece).result()
            self.on_piece(piece.nbytes)


def write(
    output: str,
    step: int,
    state: Any,
    description: dict[str, Any],
    on_piece: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a checkpoint of `step` to `output`/checkpoints/STEP, whole or not at all.

    `state` is a tree with LazyArrays for leaves; `on_piece` is told the bytes of each piece.
    Raises UserError if `output` has a checkpoint already, of whatever step.
    """
    there = run_checkpoints.completed_steps(output)
    if there:
        raise UserError(
            f"{output} has a checkpoint already (step {there[-1]}): give another --output, or "
            "remove it"
        )
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler(on_piece)))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    folder = epath.Path(output).resolve() / run_checkpoints.FOLDER
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    handlers = {"state": handler, "description": ocp.JsonCheckpointHandler()}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), description=ocp.args.JsonSave(description)
    )
    # Orbax's threads would print the stack of an error that is raised here too.
    spoken = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as saver:
            saver.save(step, args=args, force=True)
    except BaseException:
        if not is_remote(folder):
            for partial in folder.glob(f"{step}{integrity.PARTIAL}*"):
                partial.rmtree()
        raise
    finally:
        logging.getLogger("absl").setLevel(spoken)
    if step not in run_checkpoints.completed_steps(output):
        raise UserError(f"cannot write checkpoint {step} to {output}: Orbax did not keep it")
    with explained("cannot write checksums"):
        integrity.write(folder / str(step))


def read(model_dir: str, step: int) -> tuple[dict[Path, LazyArray], dict[str, Any]]:
    """(arrays by path, description) of the checkpoint that Orbax wrote at `step`."""
    folder = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER / str(step)
    state = folder / "state"
    try:
        description = json.loads((folder / "description" / "metadata").read_text())
        metadata = json.loads((state / "_METADATA").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    ocdbt = (state / "manifest.ocdbt").exists()
    arrays = {}
    context = caching(0)  # `write` and training both leave chunks of about one piece
    for entry in metadata["tree_metadata"].values():
        path = tuple(str(key["key"]) for key in entry["key_metadata"])
        if entry["value_metadata"].get("value_type") == "None":
            continue
        name = ".".join(path)
        if ocdbt:
            kvstore = {"driver": "ocdbt", "base": f"{url(state)}/", "path": f"{name}/"}
        else:
            kvstore = f"{url(state)}/{name}/"
        arrays[path] = open_array(
            {"driver": driver, "kvstore": kvstore}, f"{state}: {name}", context
        )
    return arrays, description


def caching(count: int) -> ts.Context:
    """A context that keeps `count` bytes of decoded chunks, so that parts of one cost it once."""
    return ts.Context({"cache_pool": {"total_bytes_limit": count}})


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns TensorStore's and the system's errors into one line that begins with `what`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from error


def open_array(
    spec: dict[str, Any], where: str, context: ts.Context, *, complete: bool = False
) -> LazyArray:
    """An array that TensorStore finds by `spec`; if `complete`, a chunk that lacks is an error."""
    spec = {**spec, "recheck_cached_data": "open", "fill_missing_data_reads": not complete}
    with explained(f"{where} cannot be read"):
        store = ts.open(spec, open=True, read=True, context=context).result()

    def fetch(index):
        with explained(f"{where} cannot be read"):
            return np.asarray(store[index].read().result())

    return LazyArray(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), fetch)


def url(folder: epath.Path) -> str:
    """What TensorStore calls a folder: local or gs://."""
    text = str(folder)
    if "://" in text:
        return text
    return "file://" + urllib.parse.quote(str(pathlib.Path(text).resolve()))


logging.getLogger("orbax").setLevel(logging.ERROR)
