"""T5X checkpoints: a msgpack index with the small arrays, one zarr array for each parameter.

The networks are upstream's `t5x.examples.t5` and its scanned twin `scalable_t5`, which stacks the
layers on axis 1, leaves heads unjoined and has a relative bias in every layer.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.interop import names
from cosmo.engine.checkpoints.interop.names import Parameter
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.checkpoints.streaming import Path, caching, explained, open_array, url
from cosmo.engine.model import t5

INDEX = "checkpoint"  # the msgpack file's name
SCAN_AXIS = 1
SIDES = ("encoder", "decoder")
STACKS = ("{side}/{side}", "{side}/layers")  # a scanned stack's name: today's, and an earlier one


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether `folder` is one T5X checkpoint."""
    return (folder / INDEX).exists() and not (folder / INDEX).is_dir()


def checkpoints_in(folder: epath.Path) -> list[int]:
    """The steps of the T5X checkpoints in a folder (T5X's MODEL_DIR)."""
    found = (
        (p.name.removeprefix("checkpoint_") for p in folder.iterdir()) if folder.is_dir() else ()
    )
    return [int(s) for s in found if s.isdigit() and is_checkpoint(folder / f"checkpoint_{s}")]


def open_checkpoint(path: str) -> tuple[int, dict[str, LazyArray]]:
    """(step, arrays by name) of a checkpoint folder: "target/decoder/...", "state/...".

    Nothing but the index is read yet. Raises UserError for what is no T5X checkpoint.
    """
    folder = epath.Path(path)
    where = f"T5X checkpoint {path}"
    leaves = dict(_leaves(_index(path)))
    arrays: dict[str, LazyArray] = {}
    # Many layers may lie in one chunk: it is kept until the next array needs the room.
    context = caching(max(map(_nbytes, leaves.values())))
    for name, node in leaves.items():
        if isinstance(node, dict):
            stored = node["kvstore"].get("path") or node.get("path") or name.replace("/", ".")
            spec = {"driver": node["driver"], "kvstore": f"{url(folder)}/{stored.strip('/')}/"}
            # A missing chunk reads as zeros, which T5X does write for a fresh optimizer's state;
            # half a copy of the parameters must not pass for a model.
            complete = name.startswith("target/")
            arrays[name] = open_array(spec, f"{where}: {name}", context, complete=complete)
        elif node is not None:
            arrays[name] = lazy.from_array(np.asarray(node))
    step = arrays.pop("state/step", None)
    return int(step.whole()) if step else 0, arrays


def step_of(path: str) -> int:
    """The step of a checkpoint folder, from its index alone."""
    return int(np.asarray(_index(path).get("state", {}).get("step", 0)))


def _index(path: str) -> dict[str, Any]:
    """The index's tree {"target": ..., "state": ...}; UserError for what is no T5X checkpoint."""
    where = f"T5X checkpoint {path}"
    try:
        content = serialization.msgpack_restore((epath.Path(path) / INDEX).read_bytes())
    except (OSError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise UserError(f"{where}: its index {INDEX!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or "target" not in content.get("optimizer", {}):
        raise UserError(f"{where}: its index holds no optimizer/target: no checkpoint of T5X's")
    return content["optimizer"]


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf): an array, or the dict that tells TensorStore where one is."""
    if not isinstance(node, dict) or "kvstore" in node:
        yield name, node
        return
    for key, child in node.items():
        yield from _leaves(child, f"{name}/{key}" if name else key)


def _nbytes(node: Any) -> int:
    """Bytes of an array that the index says is kept apart; 0 for another leaf."""
    shape = node.get("metadata", {}).get("shape", ()) if isinstance(node, dict) else ()
    return math.prod(shape) * 4


def network(path: str, arrays: dict[str, LazyArray]) -> t5.T5Config:
    """The network that a checkpoint's arrays are of, from their names and shapes alone."""
    target = _target(arrays)

    def shape(name: str) -> tuple[int, ...]:
        if name not in target:
            raise UserError(f"T5X checkpoint {path} has no target/{name}: of another architecture")
        return target[name].shape

    stack = _stack(target, "encoder")
    first = stack or "encoder/layers_0"
    if stack:
        heads, head_dim = shape(f"{stack}/attention/query/kernel")[2:]
        layers = [shape(f"{_stack(target, side)}/mlp/wo/kernel")[SCAN_AXIS] for side in SIDES]
        buckets = shape(f"{stack}/relpos_bias/rel_embedding")[-1]
    else:
        heads, buckets = shape("encoder/relpos_bias/rel_embedding")
        head_dim = shape(f"{first}/attention/query/kernel")[1] // heads
        layers = [_count_layers(target, side) for side in SIDES]
    vocab_size, emb_dim = shape("token_embedder/embedding")
    return t5.T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        num_encoder_layers=layers[0],
        num_decoder_layers=layers[1],
        head_dim=head_dim,
        mlp_dim=shape(f"{first}/mlp/wo/kernel")[0],
        mlp_activations=("gelu", "linear") if f"{first}/mlp/wi_0/kernel" in target else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in target,
        relative_attention_num_buckets=buckets,
        relative_attention_per_layer=bool(stack),
    )


def _target(arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
    """The parameters among the arrays, without their common prefix."""
    prefix = "target/"
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def _stack(target: dict[str, LazyArray], side: str) -> str | None:
    """The name of a side's stack in the scanned network; None if layers are apart."""
    for pattern in STACKS:
        prefix = pattern.format(side=side)
        if any(name.startswith(f"{prefix}/") for name in target):
            return prefix
    return None


def _count_layers(target: dict[str, LazyArray], side: str) -> int:
    return len({name.split("/")[1] for name in target if name.startswith(f"{side}/layers_")})


def stored(parameter: Parameter, stack: str | None) -> list[str]:
    """T5X's names of the arrays that hold a parameter: one, or one a layer."""
    name = parameter.name.t5x
    if parameter.side is None:
        return [name]
    if stack:
        return [f"{stack}/{name}"]
    return [f"{parameter.side}/layers_{i}/{name}" for i in range(parameter.layers)]


def stacks(arrays: dict[str, LazyArray]) -> dict[str | None, str | None]:
    """The stack's name of each side, as `stored` wants it."""
    target = _target(arrays)
    return {None: None, **{side: _stack(target, side) for side in SIDES}}


def scanned_shape(parameter: Parameter, config: t5.T5Config) -> tuple[int, ...]:
    """A stack's shape in the scanned network: layers on axis 1, heads apart."""
    shape: list[int] = []
    for size, axis in zip(parameter.shape, parameter.axes, strict=True):
        shape += [config.num_heads, config.head_dim] if axis == "joined_kv" else [size]
    return (*shape[:SCAN_AXIS], parameter.layers, *shape[SCAN_AXIS:])


def read(path: str, arrays: dict[str, LazyArray], config: t5.T5Config) -> dict[Path, LazyArray]:
    """Our parameters, float32, from T5X's arrays; UserError if they are not exactly those."""
    target, stack_of = _target(arrays), stacks(arrays)
    parameters = names.parameters(config)
    wanted = {}
    for parameter in parameters:
        stack = stack_of[parameter.side]
        shape = scanned_shape(parameter, config) if stack else parameter.shape
        wanted |= dict.fromkeys(stored(parameter, stack), shape)
    found = {name: array.shape for name, array in target.items()}
    names.check_same(f"T5X checkpoint {path}", wanted, found)
    out = {}
    for parameter in parameters:
        stack = stack_of[parameter.side]
        parts = [target[name] for name in stored(parameter, stack)]
        if stack:
            array = _layers_first(parts[0], parameter)
        else:
            array = lazy.stacked(parts) if parameter.side else parts[0]
        out[parameter.path] = lazy.astype(array, np.float32)
    return out


def _layers_first(source: LazyArray, parameter: Parameter) -> LazyArray:
    """A stack of the scanned network as ours: layers on the first axis, heads joined."""

    def read(index):
        layers, *rest = index
        everything = [slice(0, n) for n in source.shape]
        part = source.read((*everything[:SCAN_AXIS], layers, *everything[SCAN_AXIS + 1 :]))
        part = np.moveaxis(part, SCAN_AXIS, 0)
        return part.reshape(len(part), *parameter.shape)[(slice(None), *rest)]

    return LazyArray((parameter.layers, *parameter.shape), source.dtype, read)


def write(
    folder: epath.Path,
    step: int,
    params: dict[Path, LazyArray],
    config: t5.T5Config,
    param_states: dict[str, dict[str, np.ndarray]] | None,
    on_piece: Callable[[int], None],
) -> None:
    """Write a checkpoint that upstream T5X restores, the index last.

    The scanned layout is written where layers have a relative bias each, else the plain one.
    `param_states` maps T5X's parameter names to Adafactor's arrays; without them T5X has to start
    its optimizer anew.
    """
    _check_representable(config)
    optimizer: dict[str, Any] = {"target": {}, "state": {"step": np.array(step, np.int32)}}
    for parameter in names.parameters(config):
        array = params[parameter.path]
        stack = STACKS[0].format(side=parameter.side) if config.relative_attention_per_layer else ""
        targets = stored(parameter, stack if parameter.side else None)
        if parameter.side and stack:
            shape = scanned_shape(parameter, config)
            one = (*shape[:SCAN_AXIS], 1, *shape[SCAN_AXIS + 1 :])
            parts = (
                ((slice(None),) * SCAN_AXIS + (slice(i, i + 1),), piece.reshape(one))
                for i in range(parameter.layers)
                for piece in [lazy.layer(array, i).whole()]
            )
            arrays = [(targets[0], shape, one, parts)]
        else:
            layers = [array]
            if parameter.side:
                layers = [lazy.layer(array, i) for i in range(parameter.layers)]
            arrays = [
                (name, layer.shape, layer.piece_shape(), layer.pieces())
                for name, layer in zip(targets, layers, strict=True)
            ]
        for name, shape, chunks, pieces in arrays:
            spec = write_zarr(folder, f"target/{name}", shape, chunks, pieces, on_piece)
            _put(optimizer["target"], name, spec)
    if param_states is not None:
        optimizer["state"]["param_states"] = {}
        for name, kinds in param_states.items():
            for kind, array in kinds.items():
                leaf: Any = array
                if kind == "v" and array.shape != (1,):  # as upstream: laid out as its parameter
                    whole = [(tuple(slice(0, n) for n in array.shape), array)]
                    key = f"state/param_states/{name}/{kind}"
                    leaf = write_zarr(folder, key, array.shape, array.shape, whole, on_piece)
                _put(optimizer["state"]["param_states"], f"{name}/{kind}", leaf)
    index = serialization.msgpack_serialize(
        {"version": 3, "optimizer": _sorted(optimizer)}, in_place=True
    )
    (folder / INDEX).write_bytes(index)


def _check_representable(config: t5.T5Config) -> None:
    """Raise UserError for what T5X's T5 cannot compute, or what `network` would read otherwise."""
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
            raise UserError(f"T5X's T5 has no {name}={getattr(config, name)!r}, only {allowed}")


def write_zarr(folder, name, shape, chunks, pieces, on_piece) -> dict[str, Any]:
    """Write one array piece by piece; the entry that T5X's index has for it."""
    file = name.replace("/", ".")
    metadata = {
        "shape": list(shape),
        "chunks": [max(n, 1) for n in chunks],
        "compressor": {"id": "gzip", "level": 1},
    }
    spec = {"driver": "zarr", "kvstore": f"{url(folder)}/{file}/", "dtype": "float32"}
    with explained(f"cannot write {folder}/{file}"):
        target = ts.open({**spec, "metadata": metadata}, create=True, delete_existing=True).result()
    for index, piece in pieces:
        with explained(f"cannot write {folder}/{file}"):
            target[index].write(piece.astype(np.float32, copy=False)).result()
        on_piece(piece.nbytes)
    # The path is relative, so that the folder can be moved; T5X completes it.
    return {**spec, "kvstore": {"driver": "file", "path": f"{file}/"}, "metadata": metadata}


def _sorted(tree: Any) -> Any:
    """As upstream writes it: every dict in the order of its keys."""
    if not isinstance(tree, dict):
        return tree
    return {key: _sorted(tree[key]) for key in sorted(tree)}


def _put(tree: dict[str, Any], name: str, leaf: Any) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
