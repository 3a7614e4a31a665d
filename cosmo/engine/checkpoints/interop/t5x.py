"""Read T5X checkpoints of both kinds, and write those of the first kind.

T5X's own kind is a msgpack index, which holds the small arrays, and one zarr array for each
parameter. Since 2024 T5X writes Orbax's kind by default: a folder `state` with a list of all
arrays. Both name their arrays alike: "target/...", "state/...".

The networks are upstream's `t5x.examples.t5` and its scanned twin `scalable_t5`. The latter stacks
its layers on axis 1, keeps heads on an axis of their own and has a relative bias in every layer.
"""

import functools
import math
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization, traverse_util

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.base.files import is_remote
from cosmo.engine.checkpoints import integrity, lazy, streaming
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.interop import foreign_files, names
from cosmo.engine.checkpoints.interop.names import Parameter
from cosmo.engine.checkpoints.lazy import Index, LazyArray
from cosmo.engine.checkpoints.run_checkpoints import one_line_errors
from cosmo.engine.checkpoints.streaming import chunk_cache, open_array, tensorstore_url
from cosmo.engine.model import t5

INDEX = "checkpoint"  # the msgpack file's name
STATE = "state"  # the folder of arrays in Orbax's kind
COMMITTED = "commit_success.txt"  # in a bucket, Orbax writes it last
SCAN_AXIS = 1  # of a scanned stack: the one that counts layers
SIDES = ("encoder", "decoder")
STACKS = ("{side}/{side}", "{side}/layers")  # a scanned stack's name: today's, and an earlier one
TARGET = "target/"  # prefix of the parameters' names
STEP = "state/step"
DRIVERS = ("zarr", "zarr3")  # TensorStore's names of formats
MAX_CACHE_BYTES = 2**36  # more than the largest parameter


def is_checkpoint(folder: epath.Path) -> bool:
    """Return whether `folder` is one T5X checkpoint."""
    return _has_index(folder) or _is_orbax(folder)


def _has_index(folder: epath.Path) -> bool:
    return (folder / INDEX).exists() and not (folder / INDEX).is_dir()


def _is_orbax(folder: epath.Path) -> bool:
    """Return whether `folder` is a checkpoint of Orbax's kind, not one of ours."""
    # Either file shows it, so that the lack of the other is an error that names it.
    state = folder / STATE
    found = any((state / name).exists() for name in (streaming.TREE, streaming.OCDBT))
    return found and not (folder / "description").exists()


def checkpoints_in(folder: epath.Path) -> list[int]:
    """Return the steps of the T5X checkpoints in a folder (T5X's MODEL_DIR)."""
    if not folder.is_dir():
        return []
    found = (p.name.removeprefix("checkpoint_") for p in folder.iterdir())
    # T5X's folder also holds unfinished checkpoints, under names with a suffix.
    return [int(s) for s in found if s.isdigit() and is_checkpoint(folder / f"checkpoint_{s}")]


def open_checkpoint(path: str) -> tuple[int, dict[str, LazyArray]]:
    """Return (step, arrays by name) of a checkpoint folder: "target/decoder/...", "state/...".

    Reads the list of arrays alone. Raises UserError if the folder is no T5X checkpoint.
    """
    where = f"T5X checkpoint {path}"
    arrays = _indexed(path) if _has_index(epath.Path(path)) else _orbax(path)
    return _step(where, arrays.pop(STEP, None)), arrays


def _indexed(path: str) -> dict[str, LazyArray]:
    """Return the arrays of a checkpoint with a msgpack index, by name."""
    folder = epath.Path(path)
    where = f"T5X checkpoint {path}"
    leaves = dict(_leaves(_read_index(path)))
    arrays: dict[str, LazyArray] = {}
    # One chunk may hold many layers. Cache one array's chunks, so that none is decoded per layer.
    context = chunk_cache(max((_nbytes(node) for node in leaves.values()), default=0))
    for name, node in leaves.items():
        if isinstance(node, dict):
            driver, stored = _place(f"{where}: {name}", name, node)
            kvstore = f"{tensorstore_url(folder)}/{urllib.parse.quote(stored)}/"
            spec = {"driver": driver, "kvstore": kvstore}
            # T5X leaves out the zeros of a fresh optimizer's state: there a missing chunk is zeros.
            # A missing chunk of a parameter is an error, or half a copy would pass for a model.
            complete = name.startswith(TARGET)
            arrays[name] = open_array(spec, f"{where}: {name}", context, complete=complete)
        elif node is not None:
            arrays[name] = lazy.from_array(_numbers(f"{where}: {name}", node))
    return arrays


def _orbax(path: str, only: str | None = None) -> dict[str, LazyArray]:
    """Return the arrays of a checkpoint of Orbax's kind, by name; `only` one of them where given.

    Raises UserError if the checkpoint was not finished, or its list of arrays cannot be read.
    """
    folder = epath.Path(path)
    where = f"T5X checkpoint {path}"
    # In a bucket a folder cannot be renamed when it is complete.
    if integrity.PARTIAL in folder.name or (
        is_remote(folder) and not (folder / COMMITTED).exists()
    ):
        raise UserError(f"{where} was not finished: give another checkpoint of the run")
    try:
        foreign_files.check_no_pointer(folder / STATE / streaming.TREE)
        tree = streaming.read_tree_metadata(folder / STATE)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}; copy the whole folder again") from error
    found = {"/".join(key): key for key in tree.chunks}
    if only is None and not any(name.startswith(TARGET) for name in found):
        listed = f"{STATE}/{streaming.TREE}"
        raise UserError(f"{where}: its {listed} names no {TARGET}...: no checkpoint of T5X's")
    # As above: a chunk may hold many layers.
    sizes = (math.prod(shape) * 4 for shape in tree.chunks.values())
    context = chunk_cache(min(max(sizes, default=0), MAX_CACHE_BYTES))
    wanted = found if only is None else found.keys() & {only}
    return {
        name: streaming.open_tree_array(
            tree, found[name], context, complete=name.startswith(TARGET)
        )
        for name in wanted
    }


def step_of(path: str) -> int:
    """Return the step of a checkpoint folder. Reads no other array."""
    where = f"T5X checkpoint {path}"
    if not _has_index(epath.Path(path)):
        return _step(where, _orbax(path, only=STEP).get(STEP))
    node = dict(_leaves(_read_index(path))).get(STEP)
    found = None if node is None else _numbers(f"{where}: {STEP}", node)
    return _step(where, None if found is None else lazy.from_array(found))


def _step(where: str, array: LazyArray | None) -> int:
    """Return the step that an array holds, 0 without one. Raises UserError if it is no step."""
    if array is None:
        return 0
    if array.size != 1 or array.dtype.kind not in "iu" or int(array.whole().reshape(())) < 0:
        raise UserError(f"{where}: {STEP} is no whole number above 0: the index is damaged")
    return int(array.whole().reshape(()))


def _read_index(path: str) -> dict[str, Any]:
    """Return the index's tree {"target": ..., "state": ...}. Raises UserError if there is none."""
    where = f"T5X checkpoint {path}"
    index = epath.Path(path) / INDEX
    try:
        foreign_files.check_no_pointer(index)
        content = serialization.msgpack_restore(index.read_bytes())
    except UserError:
        raise
    # Flax raises errors of many kinds for bytes that no T5X wrote.
    except Exception as error:
        raise UserError(f"{where}: its index {INDEX!r} cannot be read: {error}") from error
    optimizer = content.get("optimizer") if isinstance(content, dict) else None
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("target"), dict):
        raise UserError(f"{where}: its index holds no optimizer/target: no checkpoint of T5X's")
    return optimizer


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf). A leaf is an array, or the dict by which TensorStore finds one."""
    # A list of what is left, not a recursion: an index may be nested deeper than Python calls.
    left: list[tuple[str, Any]] = [("", tree)]
    while left:
        name, node = left.pop()
        if not isinstance(node, dict) or "kvstore" in node:
            yield name, node
            continue
        left += [(f"{name}/{key}" if name else str(key), node[key]) for key in reversed(node)]


def _place(where: str, name: str, node: dict[str, Any]) -> tuple[str, str]:
    """Return (driver, folder) of an array that is stored outside of the index.

    Raises UserError if its entry is none of T5X's, or the folder is not in the checkpoint's.
    """
    driver, kvstore = node.get("driver"), node["kvstore"]
    if driver not in DRIVERS or not isinstance(kvstore, dict):
        raise UserError(f"{where} is stored as {shown(node)}, expected one of {DRIVERS}")
    # Older specs of TensorStore hold the path beside the kvstore.
    stored = kvstore.get("path") or node.get("path") or name.replace("/", ".")
    stored = stored.removesuffix("/") if isinstance(stored, str) else stored
    return driver, foreign_files.check_inside(where, stored)


def _numbers(where: str, node: Any) -> np.ndarray:
    """Return a leaf of the index as an array. Raises UserError if it holds no numbers."""
    if isinstance(node, np.ndarray | np.generic | int | float):
        array = np.asarray(node)
        if jnp.issubdtype(array.dtype, jnp.number) and not np.iscomplexobj(array):
            return array
    raise UserError(f"{where} is {shown(node)} in the index, expected an array of numbers")


def _nbytes(node: Any) -> int:
    """Return the bytes, as float32, of an array stored outside of the index; 0 for other leaves."""
    metadata = node.get("metadata") if isinstance(node, dict) else None
    shape = metadata.get("shape") if isinstance(metadata, dict) else None
    if not isinstance(shape, list | tuple) or not all(isinstance(size, int) for size in shape):
        return 0  # a hint for the cache alone: TensorStore reads the shape from the array's folder
    return min(max(math.prod(shape), 0) * 4, MAX_CACHE_BYTES)


def network(path: str, arrays: dict[str, LazyArray]) -> t5.T5Config:
    """Return the network of a checkpoint's arrays, from their names and shapes alone.

    T5X stores no settings. Raises UserError if an array is missing that every T5 has.
    """
    target = _target(arrays)

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in target:
            raise UserError(f"T5X checkpoint {path} has no target/{name}: of another architecture")
        found = target[name].shape
        if len(found) != axes or 0 in found:
            raise UserError(
                f"T5X checkpoint {path}: target/{name} is {found}, expected {axes} axes, none of 0"
            )
        return found

    stack_of = stacks(target)
    stack = stack_of["encoder"]
    first = stack or "encoder/layers_0"
    if stack:
        heads, head_dim = shape(f"{stack}/attention/query/kernel", 4)[2:]
        layers = [shape(f"{stack_of[side]}/mlp/wo/kernel", 3)[SCAN_AXIS] for side in SIDES]
        buckets = shape(f"{stack}/relpos_bias/rel_embedding", 3)[-1]
    else:
        # Plain T5X joins heads in its kernels. Only the bias table shows their number.
        heads, buckets = shape("encoder/relpos_bias/rel_embedding", 2)
        head_dim = shape(f"{first}/attention/query/kernel", 2)[1] // heads
        layers = [
            len({name.split("/")[1] for name in target if name.startswith(f"{side}/layers_")})
            for side in SIDES
        ]
    # The distance of the last bucket leaves no trace: T5X's models all have the default.
    vocab_size, emb_dim = shape("token_embedder/embedding", 2)
    return t5.T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        num_encoder_layers=layers[0],
        num_decoder_layers=layers[1],
        head_dim=head_dim,
        mlp_dim=shape(f"{first}/mlp/wo/kernel", 3 if stack else 2)[0],
        # An activation leaves no trace: T5 1.1's gate is gelu, T5 1.0 has relu.
        mlp_activations=("gelu", "linear") if f"{first}/mlp/wi_0/kernel" in target else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in target,
        relative_attention_num_buckets=buckets,
        relative_attention_per_layer=bool(stack),
    )


def _target(arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
    """Return the parameters among the arrays, without their common prefix."""
    return {k.removeprefix(TARGET): a for k, a in arrays.items() if k.startswith(TARGET)}


def stacks(parameter_names: Iterable[str]) -> dict[str | None, str | None]:
    """Return the scanned stack's name of each side; None where layers are apart.

    The key None is for parameters outside of the layers, which are in no stack.
    """
    found: dict[str | None, str | None] = dict.fromkeys((None, *SIDES))
    for side in SIDES:
        for prefix in (pattern.format(side=side) for pattern in STACKS):
            if any(name.startswith(f"{prefix}/") for name in parameter_names):
                found[side] = prefix
                break
    return found


def stack_to_write(parameter: Parameter, config: t5.T5Config) -> str | None:
    """Return the name of the stack that a parameter is written into, None if there is none.

    Only the scanned network has a bias in every layer, so such a model needs its layout.
    """
    scanned = config.relative_attention_per_layer and parameter.side
    return STACKS[0].format(side=parameter.side) if scanned else None


def stored(parameter: Parameter, stack: str | None) -> list[str]:
    """Return T5X's names of the arrays that hold a parameter: one, or one a layer."""
    name = parameter.name.t5x
    if parameter.side is None:
        return [name]
    if stack:
        return [f"{stack}/{name}"]
    return [f"{parameter.side}/layers_{i}/{name}" for i in range(parameter.layers)]


def heads_apart(shape: Sequence[int], axes: Sequence[str], config: t5.T5Config) -> tuple[int, ...]:
    """Return a shape with the axis of joined heads [H*K] as two axes [H, K]."""
    out: list[int] = []
    for size, axis in zip(shape, axes, strict=True):
        out += [config.num_heads, config.head_dim] if axis == "joined_kv" else [size]
    return tuple(out)


def scanned_shape(parameter: Parameter, config: t5.T5Config) -> tuple[int, ...]:
    """Return a stack's shape in the scanned network: layers on axis 1, heads apart."""
    shape = heads_apart(parameter.shape, parameter.axes, config)
    return (*shape[:SCAN_AXIS], parameter.layers, *shape[SCAN_AXIS:])


def read_params(
    path: str,
    arrays: dict[str, LazyArray],
    config: t5.T5Config,
    *,
    allow_nonfinite: bool = False,
) -> dict[Path, LazyArray]:
    """Return our parameters, float32, from T5X's arrays.

    Raises UserError if a parameter is missing, surplus or misshapen.
    """
    target = _target(arrays)
    stack_of = stacks(target)
    places = []
    for parameter in names.parameters(config):
        stack = stack_of[parameter.side]
        layout: tuple = (parameter.shape,)
        if stack:
            layout = scanned_shape(parameter, config), functools.partial(_layers_first, parameter)
        places.append(names.Place(parameter, stored(parameter, stack), *layout))
    return names.gather(f"T5X checkpoint {path}", target, places, allow_nonfinite=allow_nonfinite)


def _layers_first(parameter: Parameter, source: LazyArray) -> LazyArray:
    """Return a stack of the scanned network as ours: layers on the first axis, heads joined."""

    def read(index):
        layers, *rest = index
        # Cut along layers alone: our other axes join theirs, and a layer fits into memory.
        everything = [slice(0, n) for n in source.shape]
        part = source.read((*everything[:SCAN_AXIS], layers, *everything[SCAN_AXIS + 1 :]))
        part = np.moveaxis(part, SCAN_AXIS, 0)
        return part.reshape(len(part), *parameter.shape)[(slice(None), *rest)]

    return LazyArray((parameter.layers, *parameter.shape), source.dtype, read)


class _Output(NamedTuple):
    """An array to write: its name in the index, its shape, its chunks' shape, and its pieces."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    pieces: Iterable[tuple[Index, np.ndarray]]


def write_checkpoint(
    folder: epath.Path,
    step: int,
    params: dict[Path, LazyArray],
    config: t5.T5Config,
    param_states: dict[str, dict[str, np.ndarray]] | None,
    on_piece: Callable[[int], None],
) -> None:
    """Write a checkpoint that upstream T5X restores, the index last.

    `param_states` maps T5X's parameter names to Adafactor's arrays; without them T5X has to start
    its optimizer anew. `on_piece` receives the bytes of each piece once it is written. Raises
    UserError if T5X's T5 cannot compute the network, or the folder cannot be written.
    """
    _check_representable(config)
    index: dict[Path, Any] = {("state", "step"): np.array(step, np.int32)}
    for parameter in names.parameters(config):
        for output in _outputs(parameter, params[parameter.path], config):
            name = f"{TARGET}{output.name}"
            index[tuple(name.split("/"))] = _write_array(
                folder, output._replace(name=name), on_piece
            )
    for parameter_name, kinds in (param_states or {}).items():
        for kind, array in kinds.items():
            name = f"state/param_states/{parameter_name}/{kind}"
            leaf: Any = array
            # As upstream: an unfactored `v` is stored as its parameter is, small arrays inside the
            # index.
            if kind == "v" and array.shape != (1,):
                whole = [(tuple(slice(0, n) for n in array.shape), array)]
                leaf = _write_array(
                    folder, _Output(name, array.shape, array.shape, whole), on_piece
                )
            index[tuple(name.split("/"))] = leaf
    # Upstream writes every dict in the order of its keys; sorted paths give that order.
    optimizer = traverse_util.unflatten_dict(dict(sorted(index.items())))
    # T5X's version of its format.
    content = {"version": 3, "optimizer": optimizer}
    (folder / INDEX).write_bytes(serialization.msgpack_serialize(content, in_place=True))


def _outputs(parameter: Parameter, array: LazyArray, config: t5.T5Config) -> list[_Output]:
    """Return the arrays that hold our `array` of a parameter in a T5X checkpoint."""
    stack = stack_to_write(parameter, config)
    targets = stored(parameter, stack)
    if not stack:
        parts = lazy.layers(array) if parameter.side else [array]
        return [
            _Output(name, part.shape, part.piece_shape(), part.pieces())
            for name, part in zip(targets, parts, strict=True)
        ]
    shape = scanned_shape(parameter, config)
    chunk = (*shape[:SCAN_AXIS], 1, *shape[SCAN_AXIS + 1 :])  # one layer
    pieces = (
        ((slice(None),) * SCAN_AXIS + (slice(i, i + 1),), layer.whole().reshape(chunk))
        for i, layer in enumerate(lazy.layers(array))
    )
    return [_Output(targets[0], shape, chunk, pieces)]


def _check_representable(config: t5.T5Config) -> None:
    """Raise UserError if T5X's T5 cannot compute a network, or `network` would not read it back."""
    default = t5.T5Config(
        vocab_size=config.vocab_size,
        emb_dim=config.emb_dim,
        logits_via_embedding=config.logits_via_embedding,
    )
    for name, allowed in (
        ("mlp_activations", (("gelu", "linear"), ("relu",))),
        ("relative_attention_max_distance", (default.relative_attention_max_distance,)),
        ("logits_scale", (default.logits_scale,)),
    ):
        if getattr(config, name) not in allowed:
            raise UserError(
                f"T5X's T5 has no {name}={getattr(config, name)!r}, only {allowed}: export this "
                "model as huggingface"
            )


def _write_array(folder: epath.Path, output: _Output, on_piece) -> dict[str, Any]:
    """Write one zarr array piece by piece. Return the entry that T5X's index has for it."""
    file = output.name.replace("/", ".")
    # The path is relative, so that the folder can be moved; T5X completes it. Keys are in order,
    # as upstream writes them.
    entry = {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": f"{file}/"},
        "metadata": {
            "chunks": [max(n, 1) for n in output.chunks],
            # T5X's own choice; it reads others too.
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(output.shape),
        },
    }
    # The entry's path is relative for the index, TensorStore's here absolute.
    spec = {**entry, "kvstore": f"{tensorstore_url(folder)}/{file}/"}
    with one_line_errors(f"cannot write {folder}/{file}"):
        target = ts.open(spec, create=True, delete_existing=True).result()
    for index, piece in output.pieces:
        # The piece was read outside of this block: a read error names the source by itself.
        with one_line_errors(f"cannot write {folder}/{file}"):
            target[index].write(piece.astype(np.float32, copy=False)).result()
        on_piece(piece.nbytes)
    return entry
