"""Read and write our checkpoints piece by piece, as lazy arrays.

Training saves and restores whole states (`run_checkpoints`). Conversions read and write here, so
that a model larger than memory can pass through.
"""

import functools
import json
import logging
import pathlib
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.base.files import is_remote
from cosmo.engine.checkpoints import integrity, run_checkpoints
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.checkpoints.run_checkpoints import one_line_errors

# Orbax warns of its own plans for its API, which our users can do nothing about.
logging.getLogger("orbax").setLevel(logging.ERROR)

TREE = "_METADATA"  # Orbax's list of a tree's arrays
OCDBT = "manifest.ocdbt"  # the root of TensorStore's database


@functools.cache
def _lazy_handler() -> type:
    """Return the class of Orbax's handler for LazyArray."""
    import orbax.checkpoint as ocp  # half a CPU-second, which a command that only reads saves

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        """Orbax's handler for LazyArray: hold one piece at a time, write it as one chunk."""

        def __init__(self, on_piece: Callable[[int], None]):
            super().__init__(deepcopy_host_arrays=False)
            self.on_piece = on_piece

        async def _open_and_write(self, value, tspec, ts_context):
            # A chunk a piece: a chunk of several pieces would be read and written again for each.
            metadata = {**tspec["metadata"], "chunks": [max(n, 1) for n in value.piece_shape()]}
            spec = ts.Spec({**tspec, "metadata": metadata})
            with one_line_errors("cannot write"):
                target = await ts.open(spec, create=True, open=True, context=ts_context)
            for index in value.piece_indices():
                # Wait here, not by await: else Orbax reads a piece of every array at once.
                piece = value.read(index)
                with one_line_errors(f"cannot write {tspec['kvstore'].get('path', '')}"):
                    target[index].write(piece).result()
                self.on_piece(piece.nbytes)

    return LazyHandler


def write_checkpoint(
    output: str,
    step: int,
    state: Any,
    description: dict[str, Any],
    on_piece: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `output`/checkpoints/STEP, whole or not at all.

    `state` is a tree of LazyArrays. `on_piece` receives the bytes of each piece once it is written.
    Raises UserError if `output` has a checkpoint of any step, or cannot be written.
    """
    there = run_checkpoints.completed_steps(output)
    # Any step counts: a run in `output` would take a foreign checkpoint for its own latest one.
    if there:
        raise UserError(
            f"{output} has a checkpoint already (step {there[-1]}): give another, or remove it",
            setting="output",
        )
    import orbax.checkpoint as ocp

    lazy_handler = _lazy_handler()(on_piece)
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, lazy_handler))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    folder = epath.Path(output).resolve() / run_checkpoints.FOLDER
    # Not in the background: an error is raised by `save`, not in a thread.
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    handlers = {"state": handler, "description": ocp.JsonCheckpointHandler()}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), description=ocp.args.JsonSave(description)
    )
    run_checkpoints.quiet_orbax()
    try:
        with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as saver:
            saver.save(step, args=args, force=True)
    except BaseException:
        # In a bucket Orbax writes into the final folder; there its missing mark shows the failure.
        if not is_remote(folder):
            run_checkpoints.remove_unfinished(folder)
        raise
    if step not in run_checkpoints.completed_steps(output):
        raise UserError(f"cannot write checkpoint {step} to {output}: Orbax did not keep it")
    # If a kill comes before this, the checkpoint has no checksums, and can be read nevertheless.
    with one_line_errors("cannot write checksums"):
        integrity.write_manifest(folder / str(step), step)


def read_checkpoint(model_dir: str, step: int) -> tuple[dict[Path, LazyArray], dict[str, Any]]:
    """Return (arrays by path, description) of our checkpoint at `step`. Reads no array yet."""
    folder = epath.Path(model_dir).resolve() / run_checkpoints.FOLDER / str(step)
    try:
        description = json.loads((folder / "description" / "metadata").read_text())
        if not isinstance(description, dict):
            raise ValueError(f"its description is a {type(description).__name__}")
        tree = read_tree_metadata(folder / "state")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error
    context = chunk_cache(0)  # our chunks are about one piece each: none is read twice
    return {path: open_tree_array(tree, path, context) for path in tree.chunks}, description


class Tree(NamedTuple):
    """The metadata of a tree of arrays that Orbax wrote into one folder.

    `chunks` maps each array's path to the shape of one chunk, () where it is not recorded. With
    `complete`, chunks of zeros are stored too, so a missing chunk is damage.
    """

    folder: epath.Path
    driver: str  # TensorStore's name of the arrays' format
    ocdbt: bool  # whether the arrays are in one database, or in a folder each
    complete: bool
    chunks: dict[Path, tuple[int, ...]]


def read_tree_metadata(folder: epath.Path) -> Tree:
    """Return the metadata of Orbax's tree in `folder`. Raises OSError, or ValueError if damaged."""
    metadata = json.loads((folder / TREE).read_bytes())
    chunks: dict[Path, tuple[int, ...]] = {}
    try:
        # Orbax's versions and options differ in how they store arrays: read what is there.
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        complete = bool(metadata.get("store_array_data_equal_to_fill_value"))
        for entry in metadata["tree_metadata"].values():
            path = tuple(str(key["key"]) for key in entry["key_metadata"])
            value = entry["value_metadata"]
            # An empty leaf is of an optimizer's part without a state.
            if value.get("value_type") != "None":
                shape = value.get("write_shape")
                sized = isinstance(shape, list) and all(
                    isinstance(n, int) and n >= 0 for n in shape
                )
                chunks[path] = tuple(shape) if sized else ()
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder.name}/{TREE} lists no arrays ({reason})") from error
    for path in chunks:
        # Any other name would read files of the user's that do not belong to the checkpoint.
        if {"", ".", ".."} & set(".".join(path).split("/")):
            where = f"{folder.name}/{TREE}"
            raise ValueError(f"{where} names {shown(path)}, which is not an array's path")
    ocdbt = (folder / OCDBT).exists()
    if metadata.get("use_ocdbt") and not ocdbt:
        raise ValueError(f"{folder.name}/{OCDBT} is missing")
    return Tree(folder, driver, ocdbt, complete, chunks)


def open_tree_array(
    tree: Tree, path: Path, context: ts.Context, *, complete: bool = False
) -> LazyArray:
    """Return one array of Orbax's tree. A missing chunk is an error if `complete` or the tree is.

    Raises UserError if the array cannot be opened.
    """
    name = ".".join(path)
    url = tensorstore_url(tree.folder)
    kvstore: Any = f"{url}/{urllib.parse.quote(name)}/"
    if tree.ocdbt:
        kvstore = {"driver": "ocdbt", "base": f"{url}/", "path": f"{name}/"}
    spec = {"driver": tree.driver, "kvstore": kvstore}
    complete = complete or tree.complete
    return open_array(spec, f"{tree.folder}: {name}", context, complete=complete)


def chunk_cache(max_bytes: int) -> ts.Context:
    """Return a TensorStore context that keeps `max_bytes` of decoded chunks for further reads."""
    return ts.Context({"cache_pool": {"total_bytes_limit": max_bytes}})


def open_array(
    spec: dict[str, Any], where: str, context: ts.Context, *, complete: bool = False
) -> LazyArray:
    """Return the array that TensorStore finds by `spec`. Errors begin with `where`.

    A missing chunk reads as zeros, or is an error if `complete`.
    """
    # A checkpoint never changes: without "open" each read asks the bucket whether it has.
    spec = {**spec, "recheck_cached_data": "open", "fill_missing_data_reads": not complete}
    with one_line_errors(f"{where} cannot be read"):
        store = ts.open(spec, open=True, read=True, context=context).result()

    def read(index):
        with one_line_errors(f"{where} cannot be read"):
            return np.asarray(store[index].read().result())

    return LazyArray(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read)


def tensorstore_url(folder: epath.Path) -> str:
    """Return the URL by which TensorStore finds a folder: file:// or gs://."""
    text = str(folder)
    if "://" in text:
        return text
    return "file://" + urllib.parse.quote(str(pathlib.Path(text).resolve()))
