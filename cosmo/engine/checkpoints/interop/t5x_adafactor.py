"""Convert the state of T5X's Adafactor to that of ours, and back.

Both keep, for each tensor, the mean squares of its gradient along rows and columns (`v_row`,
`v_col`), or all of them (`v`). An array of one element stands in place of an unused one. Plain T5X
and optax call the shorter side the row. The scanned network calls the model's side the row, and
keeps the layers on an axis of their own.
"""

from typing import Any

import jax
import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import Path, path_of
from cosmo.engine.checkpoints.interop import names, t5x
from cosmo.engine.checkpoints.interop.names import Parameter
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model import t5

KINDS = ("v_row", "v_col", "v")
PREFIX = "state/param_states/"  # of the state's arrays in a T5X checkpoint


def read_state(
    path: str, arrays: dict[str, LazyArray], config: t5.T5Config, step: int, abstract: Any
) -> Any:
    """Return an optimizer state like `abstract` (the shapes of ours), of LazyArrays from T5X.

    Raises UserError if the checkpoint at `path` has none, or has one of another optimizer or
    factorisation.
    """
    where = f"T5X checkpoint {path}"
    states = {k.removeprefix(PREFIX): a for k, a in arrays.items() if k.startswith(PREFIX)}
    if not any(name.endswith("/v_row") for name in states):
        raise UserError(f"{where} holds no Adafactor state: import it without the optimizer's")
    if any(name.endswith("/m") and array.size > 1 for name, array in states.items()):
        raise UserError(f"{where}: its Adafactor has momentum (beta1), which is not carried over")
    parameters = {parameter.path: parameter for parameter in names.parameters(config)}
    stack_of = t5x.stacks(states)

    def leaf(keys, wanted):
        kind, parameter_path = meaning(path_of(keys))
        # T5X keeps one step for the whole optimizer; optax counts in each of its parts.
        if kind == "count":
            return lazy.from_array(np.full(wanted.shape, step, wanted.dtype))
        parameter = parameters[parameter_path]
        stack = stack_of[parameter.side]
        theirs, axis = _scanned(parameter, kind) if stack else (kind, 0)
        sources = []
        for name in t5x.stored(parameter, stack):
            if f"{name}/{theirs}" not in states:
                raise UserError(f"{where} lacks {PREFIX}{name}/{theirs}")
            sources.append(states[f"{name}/{theirs}"])
        one = wanted.shape[1:] if parameter.side else wanted.shape  # the shape of one layer
        # Optax marks an unused array by one element. A parameter may itself have one.
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


def to_param_states(
    arrays: dict[Path, LazyArray], config: t5.T5Config
) -> dict[str, dict[str, np.ndarray]] | None:
    """Return T5X's `param_states` {parameter's name: {kind: array}} from our optimizer's arrays.

    Returns None if they are not those of an Adafactor without momentum.
    """
    ours: dict[tuple[str, Path], LazyArray] = {}
    for path, array in arrays.items():
        if path[0] == "opt_state":
            # Another optimizer's state has no place in T5X's Adafactor.
            try:
                ours[meaning(path)] = array
            except UserError:
                return None
    states: dict[str, dict[str, np.ndarray]] = {}
    for parameter in names.parameters(config):
        if ("v", parameter.path) not in ours:
            return None
        stack = t5x.stack_to_write(parameter, config)
        stored = t5x.stored(parameter, stack)
        for kind in KINDS:
            array = ours[kind, parameter.path]
            theirs, axis = _scanned(parameter, kind) if stack else (kind, 0)
            if array.shape[-1:] == (1,) and parameter.shape != (1,):  # unused
                parts = [np.zeros((1,), np.float32)] * len(stored)
            elif stack:
                shape = _one_layer_scanned(parameter, config, kind)
                whole = array.whole().reshape(parameter.layers, *shape)
                # Ours counts layers on the first axis, the scanned network on `axis`.
                parts = [np.moveaxis(whole, 0, axis)]
            elif parameter.side:
                parts = [layer.whole() for layer in lazy.layers(array)]
            else:
                parts = [array.whole()]
            for name, part in zip(stored, parts, strict=True):
                # Upstream writes a momentum of one zero where beta1 is None.
                states.setdefault(name, {"m": np.zeros((1,), np.float32)})[theirs] = part
    return states


def meaning(path: Path) -> tuple[str, Path]:
    """Return (kind, parameter's path) of an array in our optimizer's state.

    The kind is `v_row`, `v_col`, `v` or `count`. The state is that of `optimizer.per_layer`:
    .../rest/0/KIND/PARAMETER for single tensors, .../stacks/STACK/0/KIND/PARAMETER for stacks of
    layers. Raises UserError for an array that is not Adafactor's.
    """
    for i, key in enumerate(path):
        if key == "rest":
            kind, parameter = path[i + 2], path[i + 3 :]
        elif key == "stacks":
            kind, parameter = path[i + 3], (*path[i + 1].split("/"), *path[i + 4 :])
        else:
            continue
        # Adafactor's statistics come first ("0") in optax's chain of transformations.
        if kind in (*KINDS, "count") and path[i + (1 if key == "rest" else 2)] == "0":
            return kind, parameter
        break
    raise UserError(f"{'/'.join(path)} belongs to no Adafactor without momentum")


def _scanned(parameter: Parameter, kind: str) -> tuple[str, int]:
    """Return (the scanned network's name of our `kind`, the axis of layers in it)."""
    if kind == "v" or len(parameter.shape) < 2:
        return kind, t5x.SCAN_AXIS
    axis = _kept_axis(parameter, kind)
    # "embed" is the model's side.
    theirs = "v_row" if parameter.axes[axis] == "embed" else "v_col"
    return theirs, 1 if axis == 0 else 0


def _kept_axis(parameter: Parameter, kind: str) -> int:
    """Return the axis of a matrix that optax's `v_row` or `v_col` runs along."""
    # The same call as in optax, so that equal sides get the same order.
    shorter, longer = (int(axis) for axis in np.argsort(parameter.shape)[-2:])
    return shorter if kind == "v_row" else longer


def _one_layer_scanned(parameter: Parameter, config: t5.T5Config, kind: str) -> tuple[int, ...]:
    """Return the shape of `kind` of one layer in the scanned network: heads apart."""
    axes = range(len(parameter.shape)) if kind == "v" else [_kept_axis(parameter, kind)]
    return t5x.heads_apart(
        [parameter.shape[axis] for axis in axes], [parameter.axes[axis] for axis in axes], config
    )
