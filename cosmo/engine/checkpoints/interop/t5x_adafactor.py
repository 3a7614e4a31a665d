"""The state of T5X's Adafactor as that of ours, and back.

Both keep, for each tensor, the mean squares of its gradient along rows and columns (`v_row`,
`v_col`), or all of them (`v`), with arrays of one element in place of what is not used. Plain T5X
and optax name the shorter side the row. The scanned network names the model's side the row, and
keeps the layers on an axis of their own.
"""

from typing import Any

import jax
import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.interop import names, t5x
from cosmo.engine.checkpoints.interop.names import Parameter
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.checkpoints.streaming import Path
from cosmo.engine.model import t5

KINDS = ("v_row", "v_col", "v")


def read(
    path: str, arrays: dict[str, LazyArray], config: t5.T5Config, step: int, abstract: Any
) -> Any:
    """An optimizer state like `abstract` (the shapes of ours), with LazyArrays from T5X's.

    Raises UserError if the checkpoint has none, or has one of another optimizer or factorisation.
    """
    where = f"T5X checkpoint {path}"
    prefix = "state/param_states/"
    states = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    if not any(name.endswith("/v_row") for name in states):
        raise UserError(f"{where} holds no Adafactor state: import it without the optimizer's")
    if any(name.endswith("/m") and array.size > 1 for name, array in states.items()):
        raise UserError(f"{where}: its Adafactor has momentum (beta1), which is not carried over")
    parameters = {parameter.path: parameter for parameter in names.parameters(config)}
    stack_of = t5x.stacks({f"target/{name}": array for name, array in states.items()})

    def leaf(keys, wanted):
        kind, parameter_path = meaning(tuple(_key(k) for k in keys))
        if kind == "count":
            return lazy.from_array(np.full(wanted.shape, step, wanted.dtype))
        parameter = parameters[parameter_path]
        stack = stack_of[parameter.side]
        theirs, axis = (kind, None) if not stack else _scanned(parameter, kind)
        sources = []
        for name in t5x.stored(parameter, stack):
            if f"{name}/{theirs}" not in states:
                raise UserError(f"{where} lacks state/param_states/{name}/{theirs}")
            sources.append(states[f"{name}/{theirs}"])
        one = wanted.shape[1:] if parameter.side else wanted.shape
        unused = one == (1,) and parameter.shape != (1,)
        if unused and sources[0].size == 1:
            return lazy.from_array(np.zeros(wanted.shape, np.float32))
        if stack and sources[0].size == parameter.layers * np.prod(one, dtype=int):
            sources = [lazy.layer(sources[0], i, axis) for i in range(parameter.layers)]
            sources = [lazy.reshaped(source, one) for source in sources]
        if unused or sources[0].shape != one:
            raise UserError(
                f"{where}: {kind} of {parameter.name.t5x} is {sources[0].shape} there and {one} "
                "here: its Adafactor factors other tensors than ours",
                setting="optimizer.Adafactor.min_dim_size_to_factor",
            )
        return lazy.stacked(sources) if parameter.side else sources[0]

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def write(
    arrays: dict[Path, LazyArray], config: t5.T5Config
) -> dict[str, dict[str, np.ndarray]] | None:
    """T5X's `param_states` from our optimizer's arrays; None if they are not plain Adafactor's."""
    ours: dict[tuple[str, Path], LazyArray] = {}
    for path, array in arrays.items():
        if path[0] == "opt_state":
            try:
                ours[meaning(path)] = array
            except UserError:
                return None
    states: dict[str, dict[str, np.ndarray]] = {}
    for parameter in names.parameters(config):
        if ("v", parameter.path) not in ours:
            return None
        scanned = config.relative_attention_per_layer and parameter.side
        stack = t5x.STACKS[0].format(side=parameter.side) if scanned else None
        for kind in KINDS:
            array = ours[kind, parameter.path]
            stored = t5x.stored(parameter, stack)
            unused = array.shape[-1:] == (1,) and parameter.shape != (1,)
            if unused:
                parts = [np.zeros((1,), np.float32)] * len(stored)
                theirs = _scanned(parameter, kind)[0] if scanned else kind
            elif scanned:
                theirs, axis = _scanned(parameter, kind)
                apart = array.whole().reshape(parameter.layers, *_apart(parameter, config, kind))
                parts = [np.moveaxis(apart, 0, axis)]
            else:
                theirs = kind
                parts = [lazy.layer(array, i).whole() for i in range(parameter.layers)]
                parts = parts if parameter.side else [array.whole()]
            for name, part in zip(stored, parts, strict=True):
                states.setdefault(name, {"m": np.zeros((1,), np.float32)})[theirs] = part
    return states


def meaning(path: Path) -> tuple[str, Path]:
    """(`v_row`, `v_col`, `v` or `count`, the parameter) of an array in our optimizer's state.

    The state is that of `optimizer.per_layer`: "rest" and "stacks". Raises UserError for an array
    that is not Adafactor's.
    """
    for i, key in enumerate(path):
        if key == "rest":
            kind, parameter = path[i + 2], path[i + 3 :]
        elif key == "stacks":
            kind, parameter = path[i + 3], (*path[i + 1].split("/"), *path[i + 4 :])
        else:
            continue
        if kind in (*KINDS, "count") and path[i + (1 if key == "rest" else 2)] == "0":
            return kind, parameter
        break
    raise UserError(f"{'/'.join(path)} belongs to no Adafactor without momentum")


def _scanned(parameter: Parameter, kind: str) -> tuple[str, int]:
    """(T5X's name of what we call `kind`, the axis of layers in it) in the scanned network."""
    if kind == "v" or len(parameter.shape) < 2:
        return kind, t5x.SCAN_AXIS
    axis = _kept_axis(parameter, kind)
    theirs = "v_row" if parameter.axes[axis] == "embed" else "v_col"
    return theirs, 1 if axis == 0 else 0


def _kept_axis(parameter: Parameter, kind: str) -> int:
    """The axis of a matrix that optax's `v_row` or `v_col` runs along."""
    shorter, longer = (int(axis) for axis in np.argsort(parameter.shape)[-2:])
    return shorter if kind == "v_row" else longer


def _apart(parameter: Parameter, config: t5.T5Config, kind: str) -> tuple[int, ...]:
    """The shape of `kind` of one layer in the scanned network: heads apart."""
    axes = range(len(parameter.shape)) if kind == "v" else [_kept_axis(parameter, kind)]
    shape: list[int] = []
    for axis in axes:
        heads = parameter.axes[axis] == "joined_kv"
        shape += [config.num_heads, config.head_dim] if heads else [parameter.shape[axis]]
    return tuple(shape)


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None))))
