"""Keep a model's parameters as inference multiplies by them: in the compute type, laid out once.

A step of decoding reads a decoder's matrices joined and transposed (`transformer.StepWeights`).
`hold` lays them out once and keeps no second copy. `module` gives the network over such
parameters, where programs that read all positions at once transpose them back as they read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cosmo.engine.model import models, partitioning, transformer
from cosmo.engine.model.transformer import Affine, DecoderWeights

RELATIVE_BIAS = "relpos_bias"  # is added in float32


class HeldParams(NamedTuple):
    """Parameters of which each matrix is held once, in the compute type.

    `rest` is the nested dict of parameters without those matrices of the decoder that are in
    `layers` and `logits_VM`. `layers` has for each decoder layer the matrices of `StepWeights`, by
    the names of its fields. `logits_VM` is None if the logits are tied to the embedding.
    """

    rest: models.Params
    layers: list[dict[str, jax.Array]]
    logits_VM: jax.Array | None


AnyParams = models.Params | HeldParams


def held_dtype(network: models.NetworkConfig) -> str:
    """Return the type in which matrices are held: the wider one of those they are used in."""
    return "float32" if network.product_dtype == "float32" else network.dtype


def abstract_params(model: models.EncoderDecoderModel) -> models.Params:
    """Return shapes and types of the parameters to restore for `hold`.

    Matrices are in the type they are held in. Vectors and relative biases are float32: they are
    few, and networks read some of them in float32.
    """
    dtype = held_dtype(model.network)

    def leaf(path, abstract, axes):
        vector = len(tuple(name for name in axes if name != "layers")) < 2
        keep = vector or _is_relative_bias(path)
        return jax.ShapeDtypeStruct(abstract.shape, jnp.float32 if keep else dtype)

    return jax.tree_util.tree_map_with_path(
        leaf, models.abstract_params(model), models.logical_axes(model)
    )


def cast(params: Any, dtype: str) -> Any:
    """Return parameters in the compute type, but the relative bias, which is added in float32."""

    def cast_leaf(path, array):
        return array if _is_relative_bias(path) else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, params)


def _is_relative_bias(path) -> bool:
    return any(getattr(entry, "key", None) == RELATIVE_BIAS for entry in path)


def _matrices(model: models.EncoderDecoderModel) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return {matrix of StepWeights: (a decoder layer's part, the kernels that it joins)}."""
    branches = ("wi_0", "wi_1") if len(model.network.mlp_activations) > 1 else ("wi",)
    return {
        "self_qkv_NM": ("self_attention", ("query", "key", "value")),
        "self_out_MJ": ("self_attention", ("out",)),
        "cross_query_JM": ("encoder_decoder_attention", ("query",)),
        "cross_out_MJ": ("encoder_decoder_attention", ("out",)),
        "mlp_in_NM": ("mlp", branches),
        "mlp_out_MF": ("mlp", ("wo",)),
    }


def hold(
    model: models.EncoderDecoderModel, params: models.Params, layout: partitioning.Layout
) -> HeldParams:
    """Return the parameters laid out for inference. It empties `params`: see below.

    The matrices of one name are laid out at a time, and taken out of `params` before the next, so
    that the peak of memory is one name's matrices above the parameters. Arrays have the types of
    `abstract_params`.
    """
    axes = models.logical_axes(model)
    rest = jax.tree.map(lambda x: x, params)  # new dicts, the same arrays
    params.clear()  # else the caller's would keep every matrix twice
    count = model.network.num_decoder_layers
    layers: list[dict[str, jax.Array]] = [{} for _ in range(count)]
    for name, (part, kernels) in _matrices(model).items():
        stacks = [rest["decoder"]["layers"][part].pop(kernel) for kernel in kernels]
        names = axes["decoder"]["layers"][part][kernels[0]][1:][::-1]
        found = _turned(layout, names)(stacks)
        # Waits: else the next name's would be allocated before this one's are freed.
        jax.block_until_ready(found)
        del stacks
        for layer, matrix in zip(layers, found, strict=True):
            layer[name] = matrix
    logits_VM = None
    if not model.network.logits_via_embedding:
        names = axes["decoder"]["logits_dense"][::-1]
        (logits_VM,) = _turned(layout, names)([rest["decoder"].pop("logits_dense")[None]])
    return HeldParams(rest, layers, logits_VM)


@functools.lru_cache(maxsize=32)
def _turned(layout: partitioning.Layout, names: tuple[str | None, ...]):
    """Return the jitted function from kernels [L, in, out] to L joined matrices [out, in]."""

    def turned(stacks):
        shape = (sum(s.shape[2] for s in stacks), stacks[0].shape[1])
        sharding = layout.sharding(shape, names)
        joined = [
            jnp.concatenate([stack[i].T for stack in stacks]) for i in range(stacks[0].shape[0])
        ]
        return [jax.lax.with_sharding_constraint(matrix, sharding) for matrix in joined]

    return jax.jit(turned)


def plain(model: models.EncoderDecoderModel, params: AnyParams) -> models.Params:
    """Return the parameters as a nested dict, for use inside a jitted function.

    The compiler reads transposed matrices where they are; it makes copies only of what a `lax.scan`
    over layers reads.
    """
    if not isinstance(params, HeldParams):
        return params
    full = jax.tree.map(lambda x: x, params.rest)
    for name, (part, kernels) in _matrices(model).items():
        pieces = [jnp.split(layer[name], len(kernels)) for layer in params.layers]
        for place, kernel in enumerate(kernels):
            stack = jnp.stack([piece[place].T for piece in pieces])
            full["decoder"]["layers"][part][kernel] = stack
    if params.logits_VM is not None:
        full["decoder"]["logits_dense"] = params.logits_VM.T
    return full


def decoding_module(
    model: models.EncoderDecoderModel, params: AnyParams
) -> tuple[nnx.Module, DecoderWeights]:
    """Return (the network in the compute type, its decoder's weights for `decode_step`).

    Call it inside a jitted function, outside its loop.
    """
    dtype = model.network.dtype
    # Cast and unstack once: inside the loop both would run for every token.
    module = models.bind(model, cast(plain(model, params), dtype))
    if not isinstance(params, HeldParams):
        return module, module.decoder_weights()
    axes = models.logical_axes(model)["decoder"]

    def whole(matrix, names):
        return partitioning.gather(matrix.astype(dtype), names[::-1])

    weights = []
    for i, matrices in enumerate(params.layers):
        layer = module.decoder.layer(i)
        laid_out = transformer.step_weights(layer)
        changes = {}
        for name, (part, kernels) in _matrices(model).items():
            names = axes["layers"][part][kernels[0]][1:]
            bias = getattr(laid_out, name).bias_N
            changes[name] = Affine(whole(matrices[name], names), bias)
        weights.append(laid_out._replace(**changes))
    own = module.decoder_weights()
    logits_VM = own.logits_VM
    if params.logits_VM is not None:
        logits_VM = whole(params.logits_VM, axes["logits_dense"])
    return module, DecoderWeights(weights, own.norm, logits_VM)


def bytes_per_parameter(model: models.EncoderDecoderModel, params: AnyParams) -> float:
    """Return the bytes that the arrays of `params` take, over the number of parameters."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return total / models.parameter_count(model)
