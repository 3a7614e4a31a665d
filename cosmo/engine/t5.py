"""T5 1.0 and T5 1.1 (Raffel et al. 2020; Shazeer 2020) as one Flax NNX network.

The layers of a stack live in one module whose every parameter has a leading axis of layers
(`[L, ...]`), and run in one `lax.scan`: compile time does not grow with depth. A decoder's cache is
an argument and a result, never hidden state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cosmo.engine.errors import UserError
from cosmo.engine.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    RelativePositionBias,
    RMSNorm,
    dropout,
    fan_in,
    mask_bias,
    param,
    segment_mask,
    split_key,
)

REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep every activation
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul results
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only each layer's input
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics; the names are T5X's (`t5x.examples.t5.network.T5Config`).

    T5 1.1 is `mlp_activations=("gelu", "linear")`, `logits_via_embedding=False`; T5 1.0 is
    `("relu",)` and `True`. `dtype` is the compute type; parameters, softmax, norms and logits stay
    float32.
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
    remat_policy: str = "none"
    scan_layers: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(
                    f"T5Config.mlp_activations has {name!r}; known are {sorted(ACTIVATIONS)}"
                )
        if self.remat_policy not in REMAT_POLICIES:
            raise UserError(
                f"T5Config.remat_policy={self.remat_policy!r}; known are {list(REMAT_POLICIES)}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"T5Config.dtype={self.dtype!r}; T5 runs in 'float32' or 'bfloat16' "
                "(float16 overflows in its feed-forward layers)"
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(
                f"T5Config.dropout_rate={self.dropout_rate}; it is a probability under 1"
                " (gin: DROPOUT_RATE)"
            )

    def build(self, rngs: nnx.Rngs) -> "T5":
        """A network with fresh parameters."""
        return T5(self, rngs=rngs)


class LayerCache(NamedTuple):
    """One decoder layer's keys and values: its own past, and the encoder's output."""

    self_key_BHTK: jax.Array
    self_value_BHTK: jax.Array
    cross_key_BHSK: jax.Array
    cross_value_BHSK: jax.Array


class DecoderCache(NamedTuple):
    """All that a decoding step needs beside the parameters and the tokens.

    `self_bias_THT` holds the relative and causal bias of every query position.
    """

    layers: list[LayerCache]
    cross_bias_B1S: jax.Array
    self_bias_THT: jax.Array

    def repeat(self, count: int) -> "DecoderCache":
        """Every row `count` times, neighbours in memory."""

        def repeated(array):
            return jnp.repeat(array, count, axis=0)

        return self._replace(
            layers=jax.tree.map(repeated, self.layers), cross_bias_B1S=repeated(self.cross_bias_B1S)
        )

    def take(self, rows_R: jax.Array) -> "DecoderCache":
        """Rows by index, within one input: its encoder side is the same for all, and stays."""
        layers = [
            layer._replace(
                self_key_BHTK=layer.self_key_BHTK[rows_R],
                self_value_BHTK=layer.self_value_BHTK[rows_R],
            )
            for layer in self.layers
        ]
        return self._replace(layers=layers)


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.pre_attention_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.attention = Attention(c.emb_dim, c.num_heads, c.head_dim, rngs=rngs)
        self.pre_mlp_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.mlp = MLP(c.emb_dim, c.mlp_dim, c.mlp_activations, rngs=rngs)

    def __call__(self, x_BTM: jax.Array, bias: jax.Array, key: jax.Array | None) -> jax.Array:
        rate = self.config.dropout_rate
        k_attend, k_attended, k_mlp, k_out = split_key(key, 4)
        y_BTM = self.pre_attention_layer_norm(x_BTM)
        keys, values = self.attention.keys_values(y_BTM)
        y_BTM = self.attention(y_BTM, keys, values, bias, rate=rate, key=k_attend)
        x_BTM = x_BTM + dropout(y_BTM, rate, k_attended)
        y_BTM = self.mlp(self.pre_mlp_layer_norm(x_BTM), rate=rate, key=k_mlp)
        return x_BTM + dropout(y_BTM, rate, k_out)


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder, feed-forward."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.pre_self_attention_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.self_attention = Attention(c.emb_dim, c.num_heads, c.head_dim, rngs=rngs)
        self.pre_cross_attention_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.encoder_decoder_attention = Attention(c.emb_dim, c.num_heads, c.head_dim, rngs=rngs)
        self.pre_mlp_layer_norm = RMSNorm(c.emb_dim, rngs=rngs)
        self.mlp = MLP(c.emb_dim, c.mlp_dim, c.mlp_activations, rngs=rngs)

    def __call__(
        self,
        x_BTM: jax.Array,
        encoded_BSM: jax.Array,
        self_bias: jax.Array,
        cross_bias: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:
        rate = self.config.dropout_rate
        k_self, k_selfed, k_cross, k_crossed, k_mlp, k_out = split_key(key, 6)
        y_BTM = self.pre_self_attention_layer_norm(x_BTM)
        keys, values = self.self_attention.keys_values(y_BTM)
        y_BTM = self.self_attention(y_BTM, keys, values, self_bias, rate=rate, key=k_self)
        x_BTM = x_BTM + dropout(y_BTM, rate, k_selfed)
        y_BTM = self.pre_cross_attention_layer_norm(x_BTM)
        attention = self.encoder_decoder_attention
        keys, values = attention.keys_values(encoded_BSM)
        y_BTM = attention(y_BTM, keys, values, cross_bias, rate=rate, key=k_cross)
        x_BTM = x_BTM + dropout(y_BTM, rate, k_crossed)
        y_BTM = self.mlp(self.pre_mlp_layer_norm(x_BTM), rate=rate, key=k_mlp)
        return x_BTM + dropout(y_BTM, rate, k_out)

    def step(
        self, x_BM: jax.Array, index: jax.Array, cache: LayerCache, self_bias, cross_bias
    ) -> tuple[jax.Array, LayerCache]:
        """One token a row at position `index`: [B, M] -> [B, M] and the cache with it."""
        y_BM = self.pre_self_attention_layer_norm(x_BM)
        attention = self.self_attention
        key_BHK = attention.project(y_BM, attention.key)
        value_BHK = attention.project(y_BM, attention.value)

        def put(cached_BHTK, new_BHK):
            return jax.lax.dynamic_update_slice_in_dim(
                cached_BHTK, new_BHK[:, :, None], index, axis=2
            )

        cache = cache._replace(
            self_key_BHTK=put(cache.self_key_BHTK, key_BHK),
            self_value_BHTK=put(cache.self_value_BHTK, value_BHK),
        )
        x_BM = x_BM + attend_one(
            attention, y_BM, cache.self_key_BHTK, cache.self_value_BHTK, self_bias
        )
        y_BM = self.pre_cross_attention_layer_norm(x_BM)
        x_BM = x_BM + attend_one(
            self.encoder_decoder_attention,
            y_BM,
            cache.cross_key_BHSK,
            cache.cross_value_BHSK,
            cross_bias,
        )
        return x_BM + self.mlp(self.pre_mlp_layer_norm(x_BM)), cache


def attend_one(attention: Attention, x_BM, keys_BHSK, values_BHSK, bias) -> jax.Array:
    """Attention of a single query a row over cached keys: [B, M] -> [B, M]."""
    q_BHK = attention.project(x_BM, attention.query)
    logits_BHS = jnp.einsum("BHK,BHSK->BHS", q_BHK, keys_BHSK).astype(jnp.float32) + bias
    weights_BHS = jax.nn.softmax(logits_BHS, axis=-1).astype(x_BM.dtype)
    mixed_BHK = jnp.einsum("BHS,BHSK->BHK", weights_BHS, values_BHSK)
    return mixed_BHK.reshape(x_BM.shape[0], -1) @ attention.out[...].astype(x_BM.dtype)


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
        return call(nnx.merge(graphdef, state), x, key), None

    if config.remat_policy != "none":
        # Inside a scan XLA cannot undo the recomputation, so its barrier would only cost.
        body = jax.checkpoint(
            body, policy=REMAT_POLICIES[config.remat_policy], prevent_cse=not config.scan_layers
        )
    if config.scan_layers:
        return jax.lax.scan(body, x, (state, keys))[0]
    for i in range(count):
        x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], (state, keys)))
    return x


class Encoder(nnx.Module):
    """Embedded tokens to contextual vectors."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.relpos_bias = RelativePositionBias(
            config.num_heads, config.relative_attention_num_buckets, rngs=rngs
        )
        self.layers = stack(EncoderLayer, config.num_encoder_layers, config, rngs)
        self.encoder_norm = RMSNorm(config.emb_dim, rngs=rngs)

    def __call__(self, x_BTM: jax.Array, segments_BT: jax.Array, key=None) -> jax.Array:
        c = self.config
        k_in, k_layers, k_out = split_key(key, 3)
        positions = jnp.arange(x_BTM.shape[1])
        relative = self.relpos_bias(
            positions,
            positions,
            bidirectional=True,
            max_distance=c.relative_attention_max_distance,
        )
        mask = mask_bias(segment_mask(segments_BT, segments_BT))
        x_BTM = dropout(x_BTM, c.dropout_rate, k_in)
        # The two biases meet inside the layer: their sum over B and H is the largest array of all.
        x_BTM = scan_stack(
            self.layers,
            c.num_encoder_layers,
            c,
            x_BTM,
            k_layers,
            lambda layer, x, k: layer(x, relative + mask, k),
        )
        return dropout(self.encoder_norm(x_BTM), c.dropout_rate, k_out)


class Decoder(nnx.Module):
    """Embedded tokens and the encoder's output to final hidden states."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.relpos_bias = RelativePositionBias(
            c.num_heads, c.relative_attention_num_buckets, rngs=rngs
        )
        self.layers = stack(DecoderLayer, c.num_decoder_layers, c, rngs)
        self.decoder_norm = RMSNorm(c.emb_dim, rngs=rngs)
        if not c.logits_via_embedding:
            self.logits_dense = param(rngs, fan_in, (c.emb_dim, c.vocab_size), ("embed", "vocab"))

    def relative_bias(self, length: int) -> jax.Array:
        """Relative bias of every pair of positions: float32 [1, H, T, T]."""
        positions = jnp.arange(length)
        return self.relpos_bias(
            positions,
            positions,
            bidirectional=False,
            max_distance=self.config.relative_attention_max_distance,
        )

    def __call__(self, x_BTM, encoded_BSM, segments_BT, encoder_segments_BS, key=None):
        c = self.config
        k_in, k_layers, k_out = split_key(key, 3)
        length = x_BTM.shape[1]
        relative = self.relative_bias(length)
        causal_TT = jnp.tril(jnp.ones((length, length), bool))
        self_mask = mask_bias(segment_mask(segments_BT, segments_BT) & causal_TT)
        cross_mask = mask_bias(segment_mask(segments_BT, encoder_segments_BS))
        x_BTM = dropout(x_BTM, c.dropout_rate, k_in)
        x_BTM = scan_stack(
            self.layers,
            c.num_decoder_layers,
            c,
            x_BTM,
            k_layers,
            lambda layer, x, k: layer(x, encoded_BSM, relative + self_mask, cross_mask, k),
        )
        return dropout(self.decoder_norm(x_BTM), c.dropout_rate, k_out)

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` of the stack as a module of its own."""
        graphdef, state = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))


class T5(nnx.Module):
    """Encoder and decoder with shared token embeddings."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        init = nnx.initializers.normal(1.0)
        self.token_embedder = param(rngs, init, (c.vocab_size, c.emb_dim), ("vocab", "embed"))
        self.encoder = Encoder(c, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[...] -> [..., M] in the compute type."""
        return self.token_embedder[...].astype(self.config.dtype)[tokens]

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states to float32 logits: [..., M] -> [..., V].

        Tied logits are scaled by M ** -0.5 (T5 1.0). Operands stay in the compute type, products
        are summed in float32.
        """
        c = self.config
        if c.logits_via_embedding:
            x = x * (c.emb_dim**-0.5)
            kernel = self.token_embedder[...].T
        else:
            kernel = self.decoder.logits_dense[...]
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    def encode(self, tokens_BS: jax.Array, segments_BS=None, key=None) -> jax.Array:
        """Encoder output [B, S, M]; `segments_BS` defaults to one segment of non-zero tokens."""
        segments_BS = _segments(tokens_BS, segments_BS)
        return self.encoder(self.embed(tokens_BS), segments_BS, key)

    def __call__(
        self,
        encoder_tokens_BS: jax.Array,
        decoder_inputs_BT: jax.Array,
        decoder_targets_BT: jax.Array,
        encoder_segments_BS: jax.Array | None = None,
        decoder_segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Teacher-forced logits, float32 [B, T, V]. Packed rows give their segment ids."""
        k_encode, k_decode = split_key(key, 2)
        encoder_segments_BS = _segments(encoder_tokens_BS, encoder_segments_BS)
        decoder_segments_BT = _segments(decoder_targets_BT, decoder_segments_BT)
        encoded_BSM = self.encode(encoder_tokens_BS, encoder_segments_BS, k_encode)
        x_BTM = self.decoder(
            self.embed(decoder_inputs_BT),
            encoded_BSM,
            decoder_segments_BT,
            encoder_segments_BS,
            k_decode,
        )
        return self.logits(x_BTM)

    def start_cache(self, tokens_BS: jax.Array, max_length: int) -> DecoderCache:
        """Encode, and lay out an empty cache of `max_length` positions for `decode_step`."""
        c = self.config
        encoded_BSM = self.encode(tokens_BS)
        empty = jnp.zeros((tokens_BS.shape[0], c.num_heads, max_length, c.head_dim), c.dtype)
        layers = []
        for i in range(c.num_decoder_layers):
            attention = self.decoder.layer(i).encoder_decoder_attention
            keys, values = attention.keys_values(encoded_BSM)
            keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
            layers.append(LayerCache(empty, empty, keys, values))
        cross_bias_B1S = mask_bias(tokens_BS > 0)[:, None]
        causal_TT = jnp.tril(jnp.ones((max_length, max_length), bool))
        bias_HTT = self.decoder.relative_bias(max_length)[0] + mask_bias(causal_TT)
        return DecoderCache(layers, cross_bias_B1S, bias_HTT.swapaxes(0, 1))

    def decode_step(
        self, layers: list[DecoderLayer], tokens_B, index, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """Logits [B, V] for the token after position `index`, which holds `tokens_B`.

        `layers` are the decoder's layers unstacked (`[decoder.layer(i) ...]`): sliced once outside
        the loop, or every step would copy every weight.
        """
        x_BM = self.embed(tokens_B)
        self_bias_1HT = jax.lax.dynamic_index_in_dim(cache.self_bias_THT, index)
        new = []
        for layer, layer_cache in zip(layers, cache.layers, strict=True):
            x_BM, layer_cache = layer.step(
                x_BM, index, layer_cache, self_bias_1HT, cache.cross_bias_B1S
            )
            new.append(layer_cache)
        return self.logits(self.decoder.decoder_norm(x_BM)), cache._replace(layers=new)


def _segments(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
    return (tokens > 0).astype(jnp.int32) if segments is None else segments
