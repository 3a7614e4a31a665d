"""One layer of T5's encoder and of its decoder, and the way a stack of them runs.

The layers of a stack live in one module whose every parameter has a leading axis of layers
(`[L, ...]`), and run in one `lax.scan`: compile time does not grow with depth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import partitioning
from cosmo.engine.model.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    RelativePositionBias,
    RMSNorm,
    activate,
    dropout,
    rms_norm,
    split_key,
    weight,
)

_GATHERED = (partitioning.GATHERED, partitioning.GATHERED_ATTENTION)
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES: dict[str, Any] = {
    # keep every activation (but no gathered weight: that would be the whole model on every device)
    "none": jax.checkpoint_policies.save_anything_except_these_names(*_GATHERED),
    "minimal": _DOTS,  # keep matmul results
    # and attention's weights as gathered: more memory, fewer collectives
    "minimal_gathered": jax.checkpoint_policies.save_from_both_policies(
        _DOTS, jax.checkpoint_policies.save_only_these_names(partitioning.GATHERED_ATTENTION)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only each layer's input
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics; the names are T5X's (`t5x.examples.t5.network.T5Config`).

    T5 1.1 is `mlp_activations=("gelu", "linear")`, `logits_via_embedding=False`; T5 1.0 is
    `("relu",)` and `True`. `dtype` is the compute type; parameters, softmax, norms and logits stay
    float32. `product_dtype` is that of the factors of products with weights, if another (not in
    `decode_step`): "bfloat16" beside a float32 `dtype` is what a CPU with AMX is fast at, which XLA
    does not use for bfloat16 results. In T5X's scanned network (`scalable_t5`) every layer has a
    relative bias of its own (`relative_attention_per_layer`). `scale_decoder_outputs`,
    HuggingFace's name, multiplies the decoder's output by M ** -0.5; None does so where the logits
    are tied, as T5 1.0. `remat_policy="auto"`: training chooses (`sizing.choose`), all else
    recomputes nothing, as "none" and None.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.0
    dtype: str = "bfloat16"
    product_dtype: str | None = None
    remat_policy: str | None = "none"
    scan_layers: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool = False
    scale_decoder_outputs: bool | None = None

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(
                    f"T5Config.mlp_activations has {name!r}; known are {sorted(ACTIVATIONS)}"
                )
        if self.remat_policy is None:  # as --gin.REMAT_POLICY=none arrives
            object.__setattr__(self, "remat_policy", "none")
        if self.remat_policy not in ("auto", *REMAT_POLICIES):
            raise UserError(
                f"T5Config.remat_policy={self.remat_policy!r}; known are "
                f"{['auto', *REMAT_POLICIES]}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"T5Config.dtype={self.dtype!r}; T5 runs in 'float32' or 'bfloat16' "
                "(float16 overflows in its feed-forward layers)"
            )
        if self.product_dtype not in (None, "float32", "bfloat16"):
            raise UserError(
                f"T5Config.product_dtype={self.product_dtype!r}; None, 'float32' or 'bfloat16'"
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(
                f"T5Config.dropout_rate={self.dropout_rate}; it is a probability under 1",
                setting="DROPOUT_RATE",
            )

    @property
    def logits_scale(self) -> float:
        """What the decoder's output is multiplied by before the product with the logits' kernel."""
        scaled = self.scale_decoder_outputs
        if scaled is None:
            scaled = self.logits_via_embedding
        return self.emb_dim**-0.5 if scaled else 1.0

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """A network with fresh parameters."""
        from cosmo.engine.model.t5 import T5

        return T5(self, rngs=rngs)


def relative_bias(config: T5Config, rngs: nnx.Rngs) -> RelativePositionBias:
    """A table of relative biases: one a stack, or one a layer (`relative_attention_per_layer`)."""
    return RelativePositionBias(config.num_heads, config.relative_attention_num_buckets, rngs=rngs)


class LayerCache(NamedTuple):
    """One decoder layer's keys and values: each row's own past, and each input's encoder output."""

    self_key_BHTK: jax.Array
    self_value_BHTK: jax.Array
    cross_key_BHKS: jax.Array
    cross_value_BHSK: jax.Array


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        if c.relative_attention_per_layer:
            self.relpos_bias = relative_bias(c, rngs)
        self.pre_attention_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        sizes = c.emb_dim, c.num_heads, c.head_dim
        how = {"rngs": rngs, "product_dtype": c.product_dtype}
        self.attention = Attention(*sizes, **how)
        self.pre_mlp_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.mlp = MLP(c.emb_dim, c.mlp_dim, c.mlp_activations, **how)

    def __call__(self, x_BTM, relative_bias, mask_bias, key: jax.Array | None) -> jax.Array:
        rate = self.config.dropout_rate
        k_attend, k_attended, k_mlp, k_out = split_key(key, 4)
        y_BTM = self.pre_attention_layer_norm(x_BTM)
        keys, values = self.attention.keys_values(y_BTM)
        y_BTM = self.attention(
            y_BTM, keys, values, relative_bias, mask_bias, rate=rate, key=k_attend
        )
        x_BTM = x_BTM + dropout(y_BTM, rate, k_attended)
        y_BTM = self.mlp(self.pre_mlp_layer_norm(x_BTM), rate=rate, key=k_mlp)
        return x_BTM + dropout(y_BTM, rate, k_out)


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder, feed-forward."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        if c.relative_attention_per_layer:
            self.relpos_bias = relative_bias(c, rngs)
        self.pre_self_attention_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        sizes = c.emb_dim, c.num_heads, c.head_dim
        how = {"rngs": rngs, "product_dtype": c.product_dtype}
        self.self_attention = Attention(*sizes, **how)
        self.pre_cross_attention_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.encoder_decoder_attention = Attention(*sizes, **how)
        self.pre_mlp_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.mlp = MLP(c.emb_dim, c.mlp_dim, c.mlp_activations, **how)

    def __call__(
        self,
        x_BTM: jax.Array,
        encoded_BSM: jax.Array,
        relative_bias: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:
        keys_values = self.encoder_decoder_attention.keys_values(encoded_BSM)
        return self.forward(x_BTM, keys_values, relative_bias, self_mask, cross_mask, key)[0]

    def forward(
        self,
        x_BTM: jax.Array,
        cross_keys_values: tuple[jax.Array, jax.Array],
        relative_bias: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(output [B, T, M], keys and values of its positions, each [B, H, T, K])."""
        rate = self.config.dropout_rate
        k_self, k_selfed, k_cross, k_crossed, k_mlp, k_out = split_key(key, 6)
        y_BTM = self.pre_self_attention_layer_norm(x_BTM)
        keys_values = self.self_attention.keys_values(y_BTM)
        y_BTM = self.self_attention(
            y_BTM, *keys_values, relative_bias, self_mask, rate=rate, key=k_self
        )
        x_BTM = x_BTM + dropout(y_BTM, rate, k_selfed)
        y_BTM = self.pre_cross_attention_layer_norm(x_BTM)
        y_BTM = self.encoder_decoder_attention(
            y_BTM, *cross_keys_values, None, cross_mask, rate=rate, key=k_cross
        )
        x_BTM = x_BTM + dropout(y_BTM, rate, k_crossed)
        y_BTM = self.mlp(self.pre_mlp_layer_norm(x_BTM), rate=rate, key=k_mlp)
        return x_BTM + dropout(y_BTM, rate, k_out), keys_values


class StepWeights(NamedTuple):
    """A decoder layer's weights as a decoding step wants them: joined, and output by input.

    A step of few rows is bound by reading weights and by the number of operations, so queries, keys
    and values are one product [3J, M], and the branches of the feed-forward another [N, M], N being
    F or 2F. A CPU streams a weight through a product with a few columns half as fast again as
    through one with a few rows.
    """

    self_norm_M: jax.Array
    self_qkv_NM: jax.Array
    self_out_MJ: jax.Array
    cross_norm_M: jax.Array
    cross_query_JM: jax.Array
    cross_out_MJ: jax.Array
    mlp_norm_M: jax.Array
    mlp_in_NM: jax.Array
    mlp_out_MF: jax.Array


def step_weights(layer: DecoderLayer) -> StepWeights:
    """The weights of `layer` for `decode_layer`; to be made once, outside the decoding loop."""
    own, cross, dtype = layer.self_attention, layer.encoder_decoder_attention, layer.config.dtype

    def turned(*kernels: nnx.Param) -> jax.Array:
        return jnp.concatenate([weight(kernel, dtype).T for kernel in kernels])

    return StepWeights(
        layer.pre_self_attention_layer_norm.scale[...],
        turned(own.query, own.key, own.value),
        turned(own.out),
        layer.pre_cross_attention_layer_norm.scale[...],
        turned(cross.query),
        turned(cross.out),
        layer.pre_mlp_layer_norm.scale[...],
        turned(*layer.mlp.kernels()),
        turned(layer.mlp.wo),
    )


def decode_layer(
    config: T5Config,
    w: StepWeights,
    x_MB: jax.Array,
    index: jax.Array,
    cache: LayerCache,
    self_bias: jax.Array,
    cross_bias: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """One token a row at position `index`: [M, B] -> [M, B], and the cache with it."""
    heads = (x_MB.shape[1], config.num_heads, config.head_dim)
    qkv_NB = w.self_qkv_NM @ rms_norm(x_MB, w.self_norm_M, axis=0)
    query, key, value = (part.T.reshape(heads) for part in jnp.split(qkv_NB, 3))
    put, barrier = jax.lax.dynamic_update_slice_in_dim, jax.lax.optimization_barrier
    cache = cache._replace(
        self_key_BHTK=put(cache.self_key_BHTK, key[:, :, None], index, axis=2),
        self_value_BHTK=put(cache.self_value_BHTK, value[:, :, None], index, axis=2),
    )
    mixed_BJ = attend_past(query, cache.self_key_BHTK, cache.self_value_BHTK, self_bias)
    x_MB = x_MB + w.self_out_MJ @ mixed_BJ.T
    # Without a barrier XLA would fold the transpose into the product, and lose the fast one.
    query_JB = barrier(w.cross_query_JM @ rms_norm(x_MB, w.cross_norm_M, axis=0))
    query = query_JB.T.reshape(heads)
    mixed_BJ = attend_inputs(query, cache.cross_key_BHKS, cache.cross_value_BHSK, cross_bias)
    x_MB = x_MB + w.cross_out_MJ @ mixed_BJ.T
    branches_NB = w.mlp_in_NM @ rms_norm(x_MB, w.mlp_norm_M, axis=0)
    activations = config.mlp_activations
    hidden_FB = activate(activations, jnp.split(branches_NB, len(activations)))
    return x_MB + w.mlp_out_MF @ hidden_FB, cache


def attend_past(q_BHK, keys_BHTK, values_BHTK, bias) -> jax.Array:
    """Attention of a single query a row over the row's own past: [B, J]. `bias` fits [B, H, T]."""
    # One query a row is written as a matrix of one: XLA's CPU backend then finds the fast product.
    logits_BH1T = jnp.einsum("BHTK,BHSK->BHTS", q_BHK[:, :, None], keys_BHTK)
    weights_BHT = jax.nn.softmax(logits_BH1T[:, :, 0].astype(jnp.float32) + bias, axis=-1)
    return _weighted(weights_BHT, values_BHTK, q_BHK.dtype)


def attend_inputs(q_RHK, keys_BHKS, values_BHSK, bias_B1S) -> jax.Array:
    """Attention of a single query a row over the encoder's output of its input: [R, J].

    R is B times the samples or beams of an input, neighbours in memory, which share its keys.
    """
    rows, inputs = q_RHK.shape[0], keys_BHKS.shape[0]
    if (
        rows == inputs
    ):  # sums, which a CPU divides over its cores as it does not with small products
        logits_BHS = jnp.sum(_f32(q_RHK)[..., None] * _f32(keys_BHKS), axis=2) + bias_B1S
        return _weighted(jax.nn.softmax(logits_BHS, axis=-1), values_BHSK, q_RHK.dtype)
    q_BHNK = q_RHK.reshape(inputs, rows // inputs, *q_RHK.shape[1:]).swapaxes(1, 2)
    logits_BHNS = jnp.einsum("BHNK,BHKS->BHNS", q_BHNK, keys_BHKS).astype(jnp.float32)
    weights_BHNS = jax.nn.softmax(logits_BHNS + bias_B1S[:, :, None], axis=-1)
    mixed_BHNK = jnp.einsum("BHNS,BHSK->BHNK", weights_BHNS.astype(q_RHK.dtype), values_BHSK)
    return mixed_BHNK.swapaxes(1, 2).reshape(rows, -1)


def _weighted(weights_BHS, values_BHSK, dtype) -> jax.Array:
    mixed_BHK = jnp.sum(weights_BHS[..., None] * _f32(values_BHSK), axis=2)
    return mixed_BHK.reshape(mixed_BHK.shape[0], -1).astype(dtype)


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def stack(layer: type, count: int, config: T5Config, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers with independent parameters in one module: leaves `[L, ...]`."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: layer(config, rngs=nnx.Rngs(params=key)))(keys)


def scan_stack(
    layers: nnx.Module,
    count: int,
    config: T5Config,
    x: jax.Array,
    key: jax.Array | None,
    call: Callable[[nnx.Module, jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """Run `x` through all layers of a stack, recomputing activations as `remat_policy` says."""
    graphdef, state = nnx.split(layers)
    keys = None if key is None else jax.random.split(key, count)

    def body(x, layer):
        state, key = layer
        x = partitioning.constrain(x, "batch", None, None)
        return call(nnx.merge(graphdef, state), x, key), None

    name = "none" if config.remat_policy == "auto" else config.remat_policy
    if name != "none" or partitioning.gathers():
        # Inside a scan XLA cannot undo the recomputation, so its barrier would only cost.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[name], prevent_cse=not config.scan_layers)
    if config.scan_layers:
        return jax.lax.scan(body, x, (state, keys))[0]
    for i in range(count):
        x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], (state, keys)))
    return x
