"""Compute the encoder-decoder transformer that T5 and BlenderBot are, as one Flax NNX network.

First one layer of the encoder and of the decoder, then stacks of them, then the network. All layers
are pre-norm: normalised before and added after. The differences between networks are in their
configs (`t5.T5Config`, `blenderbot.BlenderbotConfig`): the norm, biases, positions, initial values.

The layers of a stack are one module whose every parameter has a leading axis of layers
(`[L, ...]`). They run in one `lax.scan`, so compile time does not grow with depth. A decoder's
cache is an argument and a result, never hidden state. `layers` lists the shape suffixes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import cpu_products, fused_attention, partitioning
from cosmo.engine.model.choice_tree import ChoiceTree
from cosmo.engine.model.layers import (
    KERNELS,
    MLP,
    Attention,
    Norm,
    RelativePositionBias,
    Segments,
    activate,
    attend_all,
    dropout,
    fan_in,
    mask_bias,
    new_norm,
    normalize,
    param,
    scale_query,
    split_key,
    times,
    visible,
    weight,
)
from cosmo.engine.model.models import NetworkConfig

FORBIDDEN = -1e20  # ParlAI's `neginf`; a finite number, so that no gradient is NaN

_GATHERED = (partitioning.GATHERED, partitioning.GATHERED_ATTENTION)
# A kernel's result too: its products would be computed again to get it.
_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(fused_attention.ATTENDED, partitioning.PROJECTED),
)
REMAT_POLICIES: dict[str, Any] = {
    # Keep every activation, but no gathered weight: that would be the whole model on every device.
    "none": jax.checkpoint_policies.save_anything_except_these_names(*_GATHERED),
    "minimal": _DOTS,  # keep matmul results
    # Keep also attention's weights as gathered, or all: more memory, fewer collectives.
    "minimal_gathered": jax.checkpoint_policies.save_from_both_policies(
        _DOTS, jax.checkpoint_policies.save_only_these_names(partitioning.GATHERED_ATTENTION)
    ),
    "minimal_gathered_all": jax.checkpoint_policies.save_from_both_policies(
        _DOTS, jax.checkpoint_policies.save_only_these_names(*_GATHERED)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only each layer's input
}


def check_config(config: NetworkConfig) -> None:
    """Raise UserError for settings of the computation that no network can have."""
    name = type(config).__name__
    if config.remat_policy not in ("auto", *REMAT_POLICIES):
        raise UserError(
            f"{name}.remat_policy={config.remat_policy!r}; known are {['auto', *REMAT_POLICIES]}"
        )
    if config.attention not in ("auto", "plain", *KERNELS):
        raise UserError(
            f"{name}.attention={config.attention!r}; known are {['auto', 'plain', *KERNELS]}",
            setting="ATTENTION",
        )
    # Activations of T5's feed-forward layers pass 65504, float16's largest number.
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"{name}.dtype={config.dtype!r}; networks run in 'float32' or 'bfloat16' "
            "(float16 overflows in T5's feed-forward layers)"
        )
    if config.product_dtype not in (None, "float32", "bfloat16"):
        raise UserError(
            f"{name}.product_dtype={config.product_dtype!r}; None, 'float32' or 'bfloat16'"
        )
    if not 0.0 <= config.dropout_rate < 1.0:
        raise UserError(
            f"{name}.dropout_rate={config.dropout_rate}; it is a probability under 1",
            setting="DROPOUT_RATE",
        )


def attention_fits(config: NetworkConfig, queries: int, keys: int) -> bool:
    """Return whether the kernel of attention has room for such lengths."""
    itemsize = jnp.dtype(config.dtype).itemsize
    return fused_attention.fits(queries, keys, config.num_heads, config.head_dim, itemsize)


def relative_bias(
    config: NetworkConfig, rngs: nnx.Rngs, *, bidirectional: bool
) -> RelativePositionBias:
    """Return a table of relative biases: one a stack, or one a layer."""
    c = config
    sizes = c.num_heads, c.relative_attention_num_buckets, c.relative_attention_max_distance
    return RelativePositionBias(*sizes, bidirectional=bidirectional, rngs=rngs)


def outer_dropout(config: NetworkConfig, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return `x` [B, T, M] under the dropout of embeddings and of what layers add to them."""
    return dropout(x, config.dropout_rate, key, shared=config.dropout_shared)


class LayerCache(NamedTuple):
    """One decoder layer's keys and values: each row's own past, and each input's encoder output."""

    # The encoder's keys have positions last: half as fast again on a CPU as the usual order.
    self_key_BHTK: jax.Array
    self_value_BHTK: jax.Array
    cross_key_BHKS: jax.Array
    cross_value_BHSK: jax.Array

    def pad_inputs(self, more: int) -> "LayerCache":
        """Return the cache with `more` positions of inputs, which must be masked as padding."""
        keys = jnp.pad(self.cross_key_BHKS, ((0, 0), (0, 0), (0, 0), (0, more)))
        values = jnp.pad(self.cross_value_BHSK, ((0, 0), (0, 0), (0, more), (0, 0)))
        return self._replace(cross_key_BHKS=keys, cross_value_BHSK=values)


class EncoderLayer(nnx.Module):
    """One encoder layer: self-attention and feed-forward, normalised before and added after."""

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        if c.relative_attention_per_layer:
            self.relpos_bias = relative_bias(c, rngs, bidirectional=True)
        self.pre_attention_layer_norm = new_norm(c.emb_dim, c.use_bias, rngs)
        sizes = c.emb_dim, c.num_heads, c.head_dim
        how = {"rngs": rngs, "product_dtype": c.product_dtype, "use_bias": c.use_bias}
        self.attention = Attention(*sizes, **how)
        self.pre_mlp_layer_norm = new_norm(c.emb_dim, c.use_bias, rngs)
        self.mlp = MLP(c.emb_dim, c.mlp_dim, c.mlp_activations, **how)

    def __call__(self, x_BTM, relative_bias, mask, key: jax.Array | None) -> jax.Array:
        """Return the layer's output [B, T, M]; `key` turns dropout on."""
        inner = self.config.inner_dropout_rate
        k_attend, k_attended, k_mlp, k_out = split_key(key, 4)
        y_BTM = self.pre_attention_layer_norm(x_BTM)
        keys, values = self.attention.keys_values(y_BTM)
        y_BTM = self.attention(y_BTM, keys, values, relative_bias, mask, rate=inner, key=k_attend)
        x_BTM = x_BTM + outer_dropout(self.config, y_BTM, k_attended)
        y_BTM = self.mlp(self.pre_mlp_layer_norm(x_BTM), rate=inner, key=k_mlp)
        return x_BTM + outer_dropout(self.config, y_BTM, k_out)


class DecoderLayer(nnx.Module):
    """One decoder layer: causal self-attention, attention to the encoder, feed-forward."""

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        if c.relative_attention_per_layer:
            self.relpos_bias = relative_bias(c, rngs, bidirectional=False)
        self.pre_self_attention_layer_norm = new_norm(c.emb_dim, c.use_bias, rngs)
        sizes = c.emb_dim, c.num_heads, c.head_dim
        how = {"rngs": rngs, "product_dtype": c.product_dtype, "use_bias": c.use_bias}
        self.self_attention = Attention(*sizes, **how)
        self.pre_cross_attention_layer_norm = new_norm(c.emb_dim, c.use_bias, rngs)
        self.encoder_decoder_attention = Attention(*sizes, **how)
        self.pre_mlp_layer_norm = new_norm(c.emb_dim, c.use_bias, rngs)
        self.mlp = MLP(c.emb_dim, c.mlp_dim, c.mlp_activations, **how)

    def __call__(
        self,
        x_BTM: jax.Array,
        relative_bias: jax.Array | RelativePositionBias | None,
        self_mask: jax.Array | Segments,
        cross_keys_values: tuple[jax.Array, jax.Array],
        cross_mask: jax.Array | Segments,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the layer's output [B, T, M]; `key` turns dropout on.

        `cross_keys_values` are those of the encoder's output, each [B, H, S, K].
        """
        config, inner = self.config, self.config.inner_dropout_rate
        k_self, k_selfed, k_cross, k_crossed, k_mlp, k_out = split_key(key, 6)
        y_BTM = self.pre_self_attention_layer_norm(x_BTM)
        keys, values = self.self_attention.keys_values(y_BTM)
        y_BTM = self.self_attention(
            y_BTM, keys, values, relative_bias, self_mask, rate=inner, key=k_self
        )
        x_BTM = x_BTM + outer_dropout(config, y_BTM, k_selfed)
        y_BTM = self.pre_cross_attention_layer_norm(x_BTM)
        y_BTM = self.encoder_decoder_attention(
            y_BTM, *cross_keys_values, None, cross_mask, rate=inner, key=k_cross
        )
        x_BTM = x_BTM + outer_dropout(config, y_BTM, k_crossed)
        y_BTM = self.mlp(self.pre_mlp_layer_norm(x_BTM), rate=inner, key=k_mlp)
        return x_BTM + outer_dropout(config, y_BTM, k_out)


class Affine(NamedTuple):
    """A weight [out, in] and a bias [out] or None, applied to columns: x [in, B] to [out, B]."""

    weight_NM: jax.Array
    bias_N: jax.Array | None = None

    def __matmul__(self, x_MB: jax.Array) -> jax.Array:
        x_MB, dtype = x_MB.astype(self.weight_NM.dtype), x_MB.dtype
        y_NB = jnp.matmul(self.weight_NM, x_MB, preferred_element_type=dtype)
        return y_NB if self.bias_N is None else y_NB + self.bias_N[:, None].astype(y_NB.dtype)


class StepWeights(NamedTuple):
    """A decoder layer's weights as a decoding step multiplies by them: joined, and [out, in].

    Queries, keys and values are one product [3J, M], and the branches of the feed-forward another
    [N, M], N being F or 2F.
    """

    # A step of few rows is bound by reading weights and by the number of operations. A CPU streams
    # a weight through a product with a few columns half as fast again as with a few rows.
    self_norm: Norm
    self_qkv_NM: Affine
    self_out_MJ: Affine
    cross_norm: Norm
    cross_query_JM: Affine
    cross_out_MJ: Affine
    mlp_norm: Norm
    mlp_in_NM: Affine
    mlp_out_MF: Affine


def step_weights(layer: DecoderLayer) -> StepWeights:
    """Return the weights of `layer` for `decode_layer`. Call it once, outside the decoding loop."""
    own, cross, dtype = layer.self_attention, layer.encoder_decoder_attention, layer.config.dtype

    def turned(module: nnx.Module, *names: str) -> Affine:
        kernels = [weight(getattr(module, name), dtype).T for name in names]
        biases = [getattr(module, f"{name}_bias")[...] for name in names if module.use_bias]
        return Affine(jnp.concatenate(kernels), jnp.concatenate(biases) if biases else None)

    return StepWeights(
        layer.pre_self_attention_layer_norm.arrays(),
        turned(own, "query", "key", "value"),
        turned(own, "out"),
        layer.pre_cross_attention_layer_norm.arrays(),
        turned(cross, "query"),
        turned(cross, "out"),
        layer.pre_mlp_layer_norm.arrays(),
        turned(layer.mlp, *layer.mlp.branches),
        turned(layer.mlp, "wo"),
    )


# Gets a token's query, key and value, each [B, H, K], and a layer's place. Returns attention's
# output [B, J] over the row's own past, that token included, and what the cache becomes.
AttendPast = Callable[[jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, Any]]


def decode_layer(
    config: NetworkConfig,
    w: StepWeights,
    x_MB: jax.Array,
    place: int,
    attend: AttendPast,
    cross_key_BHKS: jax.Array,
    cross_value_BHSK: jax.Array,
    cross_bias: jax.Array,
) -> tuple[jax.Array, Any]:
    """Decode one token a row in layer `place`. Return (output [M, B], what `attend` returned)."""
    heads = (x_MB.shape[1], config.num_heads, config.head_dim)
    # Weights stand on the left, activations [M, B] on the right: see StepWeights.
    qkv_NB = w.self_qkv_NM @ normalize(x_MB, w.self_norm, axis=0)
    # One product for the three, as a step is bound by the number of operations.
    query, key, value = (part.T.reshape(heads) for part in jnp.split(qkv_NB, 3))
    mixed_BJ, cache = attend(scale_query(query, config.use_bias), key, value, place)
    x_MB = x_MB + w.self_out_MJ @ mixed_BJ.T
    # Without a barrier XLA would fold the transpose into the product, and lose the fast one.
    query_JB = jax.lax.optimization_barrier(
        w.cross_query_JM @ normalize(x_MB, w.cross_norm, axis=0)
    )
    query = scale_query(query_JB.T.reshape(heads), config.use_bias)
    mixed_BJ = attend_inputs(query, cross_key_BHKS, cross_value_BHSK, cross_bias)
    x_MB = x_MB + w.cross_out_MJ @ mixed_BJ.T
    branches_NB = w.mlp_in_NM @ normalize(x_MB, w.mlp_norm, axis=0)
    activations = config.mlp_activations
    hidden_FB = activate(activations, jnp.split(branches_NB, len(activations)))
    return x_MB + w.mlp_out_MF @ hidden_FB, cache


def attend_written(
    q_BHK, key_BHK, value_BHK, cache: LayerCache, index, bias
) -> tuple[jax.Array, LayerCache]:
    """Write the token's key and value at position `index`, and attend: ([B, J], the cache)."""
    put = jax.lax.dynamic_update_slice_in_dim
    cache = cache._replace(
        self_key_BHTK=put(cache.self_key_BHTK, key_BHK[:, :, None], index, axis=2),
        self_value_BHTK=put(cache.self_value_BHTK, value_BHK[:, :, None], index, axis=2),
    )
    return attend_past(q_BHK, cache.self_key_BHTK, cache.self_value_BHTK, bias), cache


def attend_beside(
    q_BHK, key_BHK, value_BHK, keys_BHTK, values_BHTK, bias, own_bias
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attend to a cache and to the token itself, which is not in it: ([B, J], (key, value)).

    `bias` broadcasts to [B, H, T] and `own_bias`, the token's own, to [B, H, 1].
    """
    logits_BH1T = jnp.einsum("BHTK,BHSK->BHTS", q_BHK[:, :, None], keys_BHTK)
    own_BH1 = jnp.einsum("BHK,BHK->BH", q_BHK, key_BHK)[..., None]
    logits_BHN = jnp.concatenate(
        [_f32(logits_BH1T[:, :, 0]) + bias, _f32(own_BH1) + own_bias], axis=-1
    )
    weights_BHN = jax.nn.softmax(logits_BHN, axis=-1)
    past_BHT, own_BH1 = weights_BHN[..., :-1], weights_BHN[..., -1:]
    mixed_BHK = cpu_products.weighted(past_BHT, _f32(values_BHTK))
    mixed_BHK = mixed_BHK + own_BH1 * _f32(value_BHK)
    mixed_BJ = mixed_BHK.reshape(mixed_BHK.shape[0], -1).astype(q_BHK.dtype)
    return mixed_BJ, (key_BHK, value_BHK)


def attend_past(q_BHK, keys_BHTK, values_BHTK, bias) -> jax.Array:
    """Return the attention of one query a row to the row's own past: [B, J].

    `bias` broadcasts to [B, H, T].
    """
    # One query a row is written as a matrix of one: XLA's CPU backend then finds the fast product.
    logits_BH1T = jnp.einsum("BHTK,BHSK->BHTS", q_BHK[:, :, None], keys_BHTK)
    weights_BHT = jax.nn.softmax(logits_BH1T[:, :, 0].astype(jnp.float32) + bias, axis=-1)
    return _weighted(weights_BHT, values_BHTK, q_BHK.dtype)


def attend_inputs(q_RHK, keys_BHKS, values_BHSK, bias_B1S) -> jax.Array:
    """Return the attention of one query a row to the encoder's output of its input: [R, J].

    R is B times the samples or beams of an input, neighbours in memory, which share its keys.
    """
    rows, inputs = q_RHK.shape[0], keys_BHKS.shape[0]
    if rows == inputs:
        logits_BHS = cpu_products.weighted(_f32(q_RHK), _f32(keys_BHKS)) + bias_B1S
        return _weighted(jax.nn.softmax(logits_BHS, axis=-1), values_BHSK, q_RHK.dtype)
    # Samples of an input are the rows of one product: its keys are read once for all of them.
    q_BHNK = q_RHK.reshape(inputs, rows // inputs, *q_RHK.shape[1:]).swapaxes(1, 2)
    logits_BHNS = jnp.einsum("BHNK,BHKS->BHNS", q_BHNK, keys_BHKS).astype(jnp.float32)
    weights_BHNS = jax.nn.softmax(logits_BHNS + bias_B1S[:, :, None], axis=-1)
    mixed_BHNK = jnp.einsum("BHNS,BHSK->BHNK", weights_BHNS.astype(q_RHK.dtype), values_BHSK)
    return mixed_BHNK.swapaxes(1, 2).reshape(rows, -1)


def _weighted(weights_BHS, values_BHSK, dtype) -> jax.Array:
    mixed_BHK = cpu_products.weighted(weights_BHS, _f32(values_BHSK))
    return mixed_BHK.reshape(mixed_BHK.shape[0], -1).astype(dtype)


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def stack(layer: type, count: int, config: NetworkConfig, rngs: nnx.Rngs) -> nnx.Module:
    """Return `count` layers with independent parameters as one module of leaves [L, ...]."""
    # A key a layer: vmap over one key would give all layers the same parameters.
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: layer(config, rngs=nnx.Rngs(params=key)))(keys)


def scan_stack(
    layers: nnx.Module,
    count: int,
    config: NetworkConfig,
    x: jax.Array,
    key: jax.Array | None,
    call: Callable[[nnx.Module, jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """Return `x` after all layers of a stack; `call(layer, x, key)` runs one.

    The backward pass recomputes activations by the config's `remat_policy`.
    """
    graphdef, state = nnx.split(layers)
    keys = None if key is None else jax.random.split(key, count)

    def body(x, layer):
        state, key = layer
        # Rows of the batch stay on their devices through all layers.
        x = partitioning.constrain(x, "batch", None, None)
        return call(nnx.merge(graphdef, state), x, key), None

    # Gathered weights are not kept even where all activations are: hence a policy for "none" too.
    name = "none" if config.remat_policy == "auto" else config.remat_policy
    if name != "none" or partitioning.gathers():
        # Inside a scan XLA cannot undo the recomputation, so its barrier would only cost.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[name], prevent_cse=not config.scan_layers)
    if config.scan_layers:
        return jax.lax.scan(body, x, (state, keys))[0]
    # A Python loop: each layer is compiled on its own.
    for i in range(count):
        x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], (state, keys)))
    return x


def one_relative_bias(config: NetworkConfig) -> bool:
    """Return whether all layers of a stack share one table of relative biases."""
    return config.max_positions is None and not config.relative_attention_per_layer


def shared_bias(stack: nnx.Module, positions_T: jax.Array | None):
    """Return the relative bias that all layers of a stack share, [1, H, T, T]; None without one.

    Without positions it is for a kernel: the module of the table.
    """
    if not one_relative_bias(stack.config):
        return None
    return stack.relpos_bias if positions_T is None else stack.relpos_bias(positions_T)


def layer_bias(layer: nnx.Module, positions_T: jax.Array | None, shared):
    """Return the relative bias of a layer: `shared`, its own of the same kind, or None."""
    if shared is not None or not layer.config.relative_attention_per_layer:
        return shared
    return layer.relpos_bias if positions_T is None else layer.relpos_bias(positions_T)


def attention_mask(
    config: NetworkConfig, query_BT: jax.Array, key_BS: jax.Array, *, causal: bool = False
) -> jax.Array | Segments:
    """Return the mask of packed rows in the form that the config's attention takes."""
    if config.attention in KERNELS:
        return Segments(config.attention, query_BT, key_BS, causal)
    return mask_bias(visible(query_BT, key_BS, causal))


def position_table(config: NetworkConfig) -> nnx.Param:
    """Return the table [P, M] of absolute positions, sines and cosines in turn.

    Source: ParlAI's `create_position_codes`. Checkpoints store it, and their values count.
    """
    position_P1 = np.arange(config.max_positions)[:, None]
    angle_PN = position_P1 / 10000 ** (np.arange(0, config.emb_dim, 2) / config.emb_dim)
    table_PM = np.stack([np.sin(angle_PN), np.cos(angle_PN)], axis=-1)
    table_PM = jnp.asarray(table_PM.reshape(config.max_positions, -1), jnp.float32)
    axes = ("positions", "embed")
    return nnx.Param(table_PM, axes=axes, trained=config.train_positions)


def positions_in(segments_BT: jax.Array) -> jax.Array:
    """Return each token's position in its segment, from 0: int32 [B, T].

    The tokens of a segment are neighbours; a row that is not packed is one segment.
    """
    places_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = jnp.where(starts(segments_BT), places_T, 0)
    return places_T - jax.lax.cummax(begins_BT, axis=1)


def starts(segments_BT: jax.Array) -> jax.Array:
    """Return where a segment begins: bool [B, T]."""
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return segments_BT != before_BT


def _map_past(
    layers: list[LayerCache], change: Callable[[jax.Array], jax.Array]
) -> list[LayerCache]:
    """Return the layers with `change` applied to each row's own keys and values."""
    return [
        layer._replace(
            self_key_BHTK=change(layer.self_key_BHTK),
            self_value_BHTK=change(layer.self_value_BHTK),
        )
        for layer in layers
    ]


class DecoderCache(NamedTuple):
    """The state of a decoding loop beside parameters and tokens.

    `self_bias_THT` holds the relative and causal bias of every query position: one for all layers,
    or one for each. If some rows begin later than others, `past_bias_B1T` masks the positions
    before they do, and `begin_B` counts those.
    """

    layers: list[LayerCache]
    cross_bias_B1S: jax.Array
    self_bias_THT: list[jax.Array]
    past_bias_B1T: jax.Array | None = None
    begin_B: jax.Array | None = None

    def repeat(self, count: int) -> "DecoderCache":
        """Return the cache with `count` rows for each input, which share its encoder side."""

        def repeated(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else jnp.repeat(x, count, axis=0)

        return self._replace(
            layers=_map_past(self.layers, repeated),
            past_bias_B1T=repeated(self.past_bias_B1T),
            begin_B=repeated(self.begin_B),
        )

    def take(self, rows_R: jax.Array) -> "DecoderCache":
        """Return the cache of rows `rows_R`; row i must come from an earlier row of its input."""
        # Rows move within one input alone, so its encoder side stays.
        return self._replace(layers=_map_past(self.layers, lambda x: x[rows_R]))


class DecoderWeights(NamedTuple):
    """The weights of `EncoderDecoder.decode_step`, laid out for it."""

    layers: list[StepWeights]
    norm: Norm
    logits_VM: jax.Array

    def rounded(self, dtype: str | None) -> "DecoderWeights":
        """Return the weights with the factors of products rounded to `dtype`; None: as they are."""
        if dtype is None:
            return self

        def one(part: Norm | Affine) -> Norm | Affine:
            if isinstance(part, Norm):
                return part
            return part._replace(weight_NM=part.weight_NM.astype(dtype))

        layers = [StepWeights(*map(one, layer)) for layer in self.layers]
        return self._replace(layers=layers, logits_VM=self.logits_VM.astype(dtype))


class Encoder(nnx.Module):
    """The stack of encoder layers: embedded tokens [B, T, M] to encoded inputs [B, T, M]."""

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        if one_relative_bias(config):
            self.relpos_bias = relative_bias(config, rngs, bidirectional=True)
        if config.max_positions is not None:
            self.position_embeddings = position_table(config)
        self.layers = stack(EncoderLayer, config.num_encoder_layers, config, rngs)
        self.encoder_norm = new_norm(config.emb_dim, config.use_bias, rngs)

    def __call__(self, x_BTM: jax.Array, segments_BT: jax.Array, key=None) -> jax.Array:
        """Return the encoded inputs [B, T, M]."""
        c = self.config
        k_in, k_layers, k_out = split_key(key, 3)
        positions = None if c.attention in KERNELS else jnp.arange(x_BTM.shape[1])
        # A table for all layers is looked up once, here; tables of their own inside each layer.
        relative = shared_bias(self, positions)
        mask = attention_mask(c, segments_BT, segments_BT)
        x_BTM = outer_dropout(c, x_BTM, k_in)
        x_BTM = scan_stack(
            self.layers,
            c.num_encoder_layers,
            c,
            x_BTM,
            k_layers,
            lambda layer, x, k: layer(x, layer_bias(layer, positions, relative), mask, k),
        )
        return dropout(self.encoder_norm(x_BTM), c.inner_dropout_rate, k_out)


class Decoder(nnx.Module):
    """The stack of decoder layers: embedded tokens [B, T, M] to final hidden states [B, T, M]."""

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        if one_relative_bias(c):
            self.relpos_bias = relative_bias(c, rngs, bidirectional=False)
        if c.max_positions is not None:
            self.position_embeddings = position_table(c)
        self.layers = stack(DecoderLayer, c.num_decoder_layers, c, rngs)
        self.decoder_norm = new_norm(c.emb_dim, c.use_bias, rngs)
        if c.logits_bias:
            # A constant, as it is in HuggingFace's network: no training changes it.
            bias_V = jnp.zeros((c.vocab_size,), jnp.float32)
            self.logits_bias = nnx.Param(bias_V, axes=("vocab",), trained=False)
        if not c.logits_via_embedding:
            self.logits_dense = param(rngs, fan_in, (c.emb_dim, c.vocab_size), ("embed", "vocab"))

    def __call__(self, x_BTM, encoded_BSM, segments_BT, encoder_segments_BS, key=None):
        """Return the decoder's hidden states [B, T, M]."""
        c = self.config
        k_in, k_layers, k_out = split_key(key, 3)
        positions = None if c.attention in KERNELS else jnp.arange(x_BTM.shape[1])
        relative = shared_bias(self, positions)
        # Segments keep the examples of a packed row apart, here and across to the encoder.
        self_mask = attention_mask(c, segments_BT, segments_BT, causal=True)
        cross_mask = attention_mask(c, segments_BT, encoder_segments_BS)
        # Every layer sends a gradient to the encoder's output, of its device's heads alone. Copies
        # add them up over the layers before devices do: one all-reduce instead of one a layer.
        count = partitioning.parts(c.num_heads * c.head_dim, "joined_kv")
        if count > 1:
            encoded_BSM = partitioning.copies(encoded_BSM, count, "joined_kv")
        x_BTM = outer_dropout(c, x_BTM, k_in)
        x_BTM = scan_stack(
            self.layers,
            c.num_decoder_layers,
            c,
            x_BTM,
            k_layers,
            lambda layer, x, k: layer(
                x,
                layer_bias(layer, positions, relative),
                self_mask,
                layer.encoder_decoder_attention.keys_values(encoded_BSM),
                cross_mask,
                k,
            ),
        )
        return dropout(self.decoder_norm(x_BTM), c.inner_dropout_rate, k_out)

    def layer(self, index: int) -> DecoderLayer:
        """Return layer `index` of the stack as a module of its own."""
        graphdef, state = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))


class EncoderDecoder(nnx.Module):
    """Encoder and decoder with shared token embeddings."""

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        # T5X's are large; ParlAI's have the variance of a layer's input, and no padding.
        init = nnx.initializers.normal(1.0) if c.max_positions is None else _small_without_padding
        self.token_embedder = param(rngs, init, (c.vocab_size, c.emb_dim), ("vocab", "embed"))
        self.encoder = Encoder(c, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)

    def embed(self, tokens: jax.Array, positions: jax.Array, side: nnx.Module) -> jax.Array:
        """Return the embeddings [..., M] of tokens [...] at `positions`, in the compute type.

        `side` is the encoder or the decoder: with absolute positions each has a table. Positions
        that broadcast to the tokens are enough.
        """
        c = self.config
        x = weight(self.token_embedder, c.dtype)[tokens]
        if c.max_positions is None:  # biases in attention encode positions
            return x
        return x * math.sqrt(c.emb_dim) + weight(side.position_embeddings, c.dtype)[positions]

    def logits(self, x: jax.Array) -> jax.Array:
        """Return float32 logits [..., V] of hidden states [..., M].

        Operands stay in the compute type; products are summed in float32.
        """
        dtype = self.config.product_dtype or x.dtype
        if self.config.logits_via_embedding:
            kernel = weight(self.token_embedder, dtype).T
        else:
            kernel = weight(self.decoder.logits_dense, dtype)
        x = self._scaled(x).astype(dtype)
        return self._allowed(times(x, kernel, jnp.float32))

    def _allowed(self, logits: jax.Array) -> jax.Array:
        """Return logits [..., V] with their bias, and without those of forbidden tokens."""
        if self.config.logits_bias:
            logits = logits + self.decoder.logits_bias[...]
        if not self.config.forbidden_ids:
            return logits
        return logits.at[..., np.array(self.config.forbidden_ids)].set(FORBIDDEN)

    def _scaled(self, x: jax.Array) -> jax.Array:
        scale = self.config.logits_scale
        return x if scale == 1.0 else x * scale

    def encode(self, tokens_BS: jax.Array, segments_BS=None, key=None) -> jax.Array:
        """Return the encoder's output [B, S, M].

        `segments_BS` defaults to one segment of non-zero tokens.
        """
        segments_BS = _segments(tokens_BS, segments_BS)
        self._check_length(tokens_BS.shape[1], "inputs")
        embedded_BSM = self.embed(tokens_BS, self._positions(segments_BS), self.encoder)
        return self.encoder(embedded_BSM, segments_BS, key)

    def _positions(self, segments_BT: jax.Array) -> jax.Array | None:
        return None if self.config.max_positions is None else positions_in(segments_BT)

    def _check_length(self, length: int, feature: str) -> None:
        limit = self.config.max_positions
        if limit is not None and length > limit:
            raise UserError(
                f"{length} tokens of {feature}; this network has {limit} positions: give at most "
                "so many",
                setting=("TASK_FEATURE_LENGTHS", "MAX_NEW_TOKENS"),
            )

    def __call__(
        self,
        encoder_tokens_BS: jax.Array,
        decoder_inputs_BT: jax.Array,
        decoder_targets_BT: jax.Array,
        encoder_segments_BS: jax.Array | None = None,
        decoder_segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return teacher-forced logits, float32 [B, T, V]. Packed rows give their segment ids."""
        # Inference is the absence of a key: then no dropout is compiled.
        k_encode, k_decode = split_key(key, 2)
        encoder_segments_BS = _segments(encoder_tokens_BS, encoder_segments_BS)
        decoder_segments_BT = _segments(decoder_targets_BT, decoder_segments_BT)
        encoded_BSM = self.encode(encoder_tokens_BS, encoder_segments_BS, k_encode)
        self._check_length(decoder_inputs_BT.shape[1], "targets")
        # SeqIO shifts targets by a zero, with which T5 starts.
        if self.config.special_ids.start:
            first_BT = starts(decoder_segments_BT)
            start = self.config.special_ids.start
            decoder_inputs_BT = jnp.where(first_BT, start, decoder_inputs_BT)
        positions_BT = self._positions(decoder_segments_BT)
        x_BTM = self.decoder(
            self.embed(decoder_inputs_BT, positions_BT, self.decoder),
            encoded_BSM,
            decoder_segments_BT,
            encoder_segments_BS,
            k_decode,
        )
        return self.logits(x_BTM)

    def start_cache(self, tokens_BS: jax.Array, max_length: int) -> DecoderCache:
        """Encode, and return an empty cache of `max_length` positions for `decode_step`."""
        c = self.config
        self._check_length(max_length, "answers")
        empty = jnp.zeros((tokens_BS.shape[0], c.num_heads, max_length, c.head_dim), c.dtype)
        layers = [LayerCache(empty, empty, *cross) for cross in self.encode_keys_values(tokens_BS)]
        return self._cache(layers, tokens_BS, max_length)

    def encode_keys_values(self, tokens_BS: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Encode, and return each decoder layer's keys [B, H, K, S] and values [B, H, S, K]."""
        encoded_BSM = self.encode(tokens_BS)
        found = []
        # The encoder's keys and values are computed once; each step only reads them.
        for i in range(self.config.num_decoder_layers):
            attention = self.decoder.layer(i).encoder_decoder_attention
            keys, values = attention.keys_values(encoded_BSM)
            found.append((keys.swapaxes(2, 3), values))
        return found

    # The biases of all positions are made here once: a step of the loop then only slices them.
    def _cache(
        self, layers: list[LayerCache], tokens_BS, length: int, past=None, begin_B=None
    ) -> DecoderCache:
        c = self.config
        causal_TT = mask_bias(jnp.tril(jnp.ones((length, length), bool)))
        cross_bias_B1S = mask_bias(tokens_BS > 0)[:, None]
        if c.max_positions is not None:
            causal_THT = causal_TT[:, None]
            return DecoderCache(layers, cross_bias_B1S, [causal_THT], past, begin_B)
        biases_1HTT = [table(jnp.arange(length)) for table in self._relative_tables()]
        self_biases = [(bias[0] + causal_TT).swapaxes(0, 1) for bias in biases_1HTT]
        return DecoderCache(layers, cross_bias_B1S, self_biases, past, begin_B)

    def read_tree(
        self, weights: DecoderWeights, tokens_BS: jax.Array, tree: ChoiceTree
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Encode, and decode every node of a tree of choices at once.

        Returns logits [B, N, V] after each node and, for `resume`, each layer's keys and values
        with nodes for positions.
        """
        # One pass, in which nodes are the rows of a step: a cached step for each token reads every
        # weight as often.
        c, rows = self.config, (tokens_BS.shape[0], tree.tokens_N.size)
        weights = weights.rounded(c.product_dtype)
        self._check_length(int(tree.depths_N.max()) + 1, "choices")
        inputs = self.encode_keys_values(tokens_BS)
        # A node attends to its ancestors, as a token attends to the past.
        mask_NN = mask_bias(tree.ancestors_NN)
        relative: list[jax.Array | None] = [None]
        if c.max_positions is None:
            relative = [table(tree.depths_N) for table in self._relative_tables()]

        def attend_above(query, key, value, place):
            q_BHNK, *keys_values = (
                x.reshape(*rows, *x.shape[1:]).swapaxes(1, 2) for x in (query, key, value)
            )
            mixed_BHNK = attend_all(q_BHNK, *keys_values, relative[place % len(relative)], mask_NN)
            return mixed_BHNK.swapaxes(1, 2).reshape(query.shape[0], -1), keys_values

        nodes_R, depths_R = (jnp.tile(x, rows[0]) for x in (tree.tokens_N, tree.depths_N))
        cross_bias_B1S = mask_bias(tokens_BS > 0)[:, None]
        logits_RV, own = self.decode_token(
            weights, nodes_R, depths_R, attend_above, inputs, cross_bias_B1S
        )
        layers = [LayerCache(*past, *cross) for past, cross in zip(own, inputs, strict=True)]
        return logits_RV.reshape(*rows, -1), layers

    def resume(
        self, layers: list[LayerCache], tokens_BS, path_BD, in_path_BD, more: int
    ) -> DecoderCache:
        """Return a cache with the nodes `path_BD` in its first D positions and room for `more`.

        A path shorter than D fills the last of them (`in_path_BD`), so all rows continue at
        position D.
        """
        self._check_length(path_BD.shape[1] + more, "answers")

        def lay_out(x_BHNK):
            past = jnp.take_along_axis(x_BHNK, path_BD[:, None, :, None], axis=2)
            return jnp.pad(past, ((0, 0), (0, 0), (0, more), (0, 0)))

        layers = _map_past(layers, lay_out)
        known_BT = jnp.pad(in_path_BD, ((0, 0), (0, more)), constant_values=True)
        past_B1T = mask_bias(known_BT)[:, None]
        # Relative positions are the same after a shift, absolute ones are not.
        begin_B = None
        if self.config.max_positions is not None:
            begin_B = jnp.sum(~in_path_BD, axis=1, dtype=jnp.int32)
        return self._cache(layers, tokens_BS, known_BT.shape[1], past_B1T, begin_B)

    def decoder_weights(self) -> DecoderWeights:
        """Return the decoder's weights laid out for `decode_step`. Call it once, before a loop."""
        # Inside the loop, every step would copy every weight.
        tied = self.config.logits_via_embedding
        return DecoderWeights(
            [step_weights(self.decoder.layer(i)) for i in range(self.config.num_decoder_layers)],
            self.decoder.decoder_norm.arrays(),
            weight(self.token_embedder, self.config.dtype)
            if tied
            else weight(self.decoder.logits_dense, self.config.dtype).T,
        )

    def decode_step(
        self, weights: DecoderWeights, tokens_B, index, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """Return (logits [B, V] of the token after position `index`, the cache with it).

        `tokens_B` are the tokens at `index`.
        """
        position = index if cache.begin_B is None else index - cache.begin_B
        # The causal part of the bias masks positions that are not written yet.
        biases_1HT = [jax.lax.dynamic_index_in_dim(b, index) for b in cache.self_bias_THT]
        if cache.past_bias_B1T is not None:
            biases_1HT = [bias_1HT + cache.past_bias_B1T for bias_1HT in biases_1HT]

        def attend(query, key, value, place):
            bias_1HT = biases_1HT[place % len(biases_1HT)]  # one table for all layers, or theirs
            return attend_written(query, key, value, cache.layers[place], index, bias_1HT)

        inputs = [(layer.cross_key_BHKS, layer.cross_value_BHSK) for layer in cache.layers]
        logits_BV, layers = self.decode_token(
            weights, tokens_B, position, attend, inputs, cache.cross_bias_B1S
        )
        return logits_BV, cache._replace(layers=layers)

    def decode_token(
        self,
        weights: DecoderWeights,
        tokens_B: jax.Array,
        positions: jax.Array,
        attend: AttendPast,
        inputs: list[tuple[jax.Array, jax.Array]],
        cross_bias_B1S: jax.Array,
    ) -> tuple[jax.Array, list[Any]]:
        """Return (logits [B, V] of the token after `tokens_B`, what `attend` returned by layer).

        `positions` of the tokens are a scalar or [B]. `inputs` are the encoder's keys and values
        for each layer.
        """
        x_MB, caches = self.embed(tokens_B, positions, self.decoder).T, []
        for place, (layer, keys_values) in enumerate(zip(weights.layers, inputs, strict=True)):
            x_MB, cache = decode_layer(
                self.config, layer, x_MB, place, attend, *keys_values, cross_bias_B1S
            )
            caches.append(cache)
        # The barrier keeps the transpose out of the product: see `decode_layer`.
        x_BM = jax.lax.optimization_barrier(self._scaled(normalize(x_MB.T, weights.norm)))
        x_BM = x_BM.astype(weights.logits_VM.dtype)
        return self._allowed(cpu_products.logits(x_BM, weights.logits_VM)), caches

    def biases_of_ages(self, ages_T: jax.Array) -> list[jax.Array]:
        """Return the relative biases of keys that are `ages_T` tokens old: each float32 [1, H, T].

        One for all layers or one for each; of a network with absolute positions, zeros [1, 1, T].
        """
        c = self.config
        if c.max_positions is not None:
            return [jnp.zeros((1, 1, ages_T.size), jnp.float32)]
        return [bias.at_distances(-ages_T)[None] for bias in self._relative_tables()]

    def _relative_tables(self) -> list[RelativePositionBias]:
        """Return the decoder's tables of relative biases: one for all layers, or one for each."""
        c = self.config
        if not c.relative_attention_per_layer:
            return [self.decoder.relpos_bias]
        return [self.decoder.layer(i).relpos_bias for i in range(c.num_decoder_layers)]


def _small_without_padding(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    table_VM = jax.random.normal(key, shape, dtype) * shape[1] ** -0.5
    return table_VM.at[0].set(0.0)


def _segments(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
    return (tokens > 0).astype(jnp.int32) if segments is None else segments
