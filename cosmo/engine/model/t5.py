"""T5 1.0 and T5 1.1 (Raffel et al. 2020; Shazeer 2020) as one Flax NNX network.

A decoder's cache is an argument and a result, never hidden state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cosmo.engine.model.choices import Tree
from cosmo.engine.model.layers import (
    RMSNorm,
    dropout,
    fan_in,
    mask_bias,
    param,
    rms_norm,
    segment_mask,
    split_key,
    weight,
)
from cosmo.engine.model.t5_layers import (
    DecoderLayer,
    EncoderLayer,
    LayerCache,
    StepWeights,
    T5Config,
    decode_layer,
    relative_bias,
    scan_stack,
    stack,
    step_weights,
)

__all__ = ["T5", "DecoderCache", "LayerCache", "T5Config"]


class DecoderCache(NamedTuple):
    """All that a decoding step needs beside the parameters and the tokens.

    `self_bias_THT` holds the relative and causal bias of every query position: one for all layers,
    or one for each. `past_bias_B1T` masks the first positions of rows that begin later than others,
    if rows do.
    """

    layers: list[LayerCache]
    cross_bias_B1S: jax.Array
    self_bias_THT: list[jax.Array]
    past_bias_B1T: jax.Array | None = None

    def repeat(self, count: int) -> "DecoderCache":
        """`count` rows for each input, neighbours in memory, that share its encoder side."""
        layers = [
            layer._replace(
                self_key_BHTK=jnp.repeat(layer.self_key_BHTK, count, axis=0),
                self_value_BHTK=jnp.repeat(layer.self_value_BHTK, count, axis=0),
            )
            for layer in self.layers
        ]
        past = self.past_bias_B1T
        past = None if past is None else jnp.repeat(past, count, axis=0)
        return self._replace(layers=layers, past_bias_B1T=past)

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


class DecoderWeights(NamedTuple):
    """All that `T5.decode_step` multiplies by, laid out for it."""

    layers: list[StepWeights]
    norm_M: jax.Array
    logits_VM: jax.Array


class Encoder(nnx.Module):
    """Embedded tokens to contextual vectors."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        if not config.relative_attention_per_layer:
            self.relpos_bias = relative_bias(config, rngs)
        self.layers = stack(EncoderLayer, config.num_encoder_layers, config, rngs)
        self.encoder_norm = RMSNorm(config.emb_dim, rngs=rngs)

    def __call__(self, x_BTM: jax.Array, segments_BT: jax.Array, key=None) -> jax.Array:
        c = self.config
        k_in, k_layers, k_out = split_key(key, 3)
        length = x_BTM.shape[1]
        relative = None if c.relative_attention_per_layer else self.relative_bias(self, length)
        mask = mask_bias(segment_mask(segments_BT, segments_BT))
        x_BTM = dropout(x_BTM, c.dropout_rate, k_in)
        x_BTM = scan_stack(
            self.layers,
            c.num_encoder_layers,
            c,
            x_BTM,
            k_layers,
            lambda layer, x, k: layer(
                x, self.relative_bias(layer, length) if relative is None else relative, mask, k
            ),
        )
        return dropout(self.encoder_norm(x_BTM), c.dropout_rate, k_out)

    def relative_bias(self, owner: nnx.Module, length: int) -> jax.Array:
        """Relative bias of every pair of positions by the table of `owner`: float32 [1, H, T, T].

        The owner is a layer if each has its own table, else the encoder.
        """
        positions = jnp.arange(length)
        distance = self.config.relative_attention_max_distance
        return owner.relpos_bias(positions, positions, bidirectional=True, max_distance=distance)


class Decoder(nnx.Module):
    """Embedded tokens and the encoder's output to final hidden states."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        if not c.relative_attention_per_layer:
            self.relpos_bias = relative_bias(c, rngs)
        self.layers = stack(DecoderLayer, c.num_decoder_layers, c, rngs)
        self.decoder_norm = RMSNorm(c.emb_dim, rngs=rngs)
        if not c.logits_via_embedding:
            self.logits_dense = param(rngs, fan_in, (c.emb_dim, c.vocab_size), ("embed", "vocab"))

    def relative_bias(self, owner: nnx.Module, positions: jax.Array) -> jax.Array:
        """As `Encoder.relative_bias` of `positions` [T]; buckets tell apart the past alone."""
        distance = self.config.relative_attention_max_distance
        return owner.relpos_bias(positions, positions, bidirectional=False, max_distance=distance)

    def __call__(self, x_BTM, encoded_BSM, segments_BT, encoder_segments_BS, key=None):
        c = self.config
        k_in, k_layers, k_out = split_key(key, 3)
        length = x_BTM.shape[1]
        positions = jnp.arange(length)
        relative = None if c.relative_attention_per_layer else self.relative_bias(self, positions)
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
            lambda layer, x, k: layer(
                x,
                encoded_BSM,
                self.relative_bias(layer, positions) if relative is None else relative,
                self_mask,
                cross_mask,
                k,
            ),
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
        return weight(self.token_embedder, self.config.dtype)[tokens]

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states to float32 logits: [..., M] -> [..., V].

        Operands stay in the compute type, products are summed in float32.
        """
        dtype = self.config.product_dtype or x.dtype
        if self.config.logits_via_embedding:
            kernel = weight(self.token_embedder, dtype).T
        else:
            kernel = weight(self.decoder.logits_dense, dtype)
        return jnp.matmul(self._scaled(x).astype(dtype), kernel, preferred_element_type=jnp.float32)

    def _scaled(self, x: jax.Array) -> jax.Array:
        scale = self.config.logits_scale
        return x if scale == 1.0 else x * scale

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
            layers.append(LayerCache(empty, empty, keys.swapaxes(2, 3), values))
        return self._cache(layers, tokens_BS, max_length)

    def _cache(self, layers: list[LayerCache], tokens_BS, length: int, past=None) -> DecoderCache:
        c = self.config
        causal_TT = jnp.tril(jnp.ones((length, length), bool))
        owners = [self.decoder]
        if c.relative_attention_per_layer:
            owners = [self.decoder.layer(i) for i in range(c.num_decoder_layers)]
        biases_HTT = [
            self.decoder.relative_bias(owner, jnp.arange(length))[0] + mask_bias(causal_TT)
            for owner in owners
        ]
        self_biases = [bias.swapaxes(0, 1) for bias in biases_HTT]
        return DecoderCache(layers, mask_bias(tokens_BS > 0)[:, None], self_biases, past)

    def read_tree(self, tokens_BS: jax.Array, tree: Tree) -> tuple[jax.Array, list[LayerCache]]:
        """Encode, and decode every node of a tree of choices at once.

        Returns final hidden states [B, N, M] and, for `resume`, each layer's keys and values, with
        nodes for positions.
        """
        c = self.config
        encoded_BSM = self.encode(tokens_BS)
        nodes = jnp.broadcast_to(tree.tokens_N, (tokens_BS.shape[0], tree.tokens_N.size))
        x_BNM, layers = self.embed(nodes), []
        self_mask, cross_mask = mask_bias(tree.ancestors_NN), mask_bias(tokens_BS > 0)
        for i in range(c.num_decoder_layers):
            layer = self.decoder.layer(i)
            owner = layer if c.relative_attention_per_layer else self.decoder
            relative = self.decoder.relative_bias(owner, tree.depths_N)
            keys, values = layer.encoder_decoder_attention.keys_values(encoded_BSM)
            x_BNM, own = layer.forward(
                x_BNM, (keys, values), relative, self_mask, cross_mask[:, None, None]
            )
            layers.append(LayerCache(*own, keys.swapaxes(2, 3), values))
        return self.decoder.decoder_norm(x_BNM), layers

    def resume(
        self, layers: list[LayerCache], tokens_BS, path_BD, in_path_BD, more: int
    ) -> DecoderCache:
        """A cache that holds the path of nodes `path_BD` in its first D positions, and room for
        `more`.

        A path shorter than D fills the last of them (`in_path_BD`): T5 knows relative positions
        alone, so all rows go on at position D.
        """

        def lay_out(x_BHNK):
            past = jnp.take_along_axis(x_BHNK, path_BD[:, None, :, None], axis=2)
            return jnp.pad(past, ((0, 0), (0, 0), (0, more), (0, 0)))

        layers = [
            layer._replace(
                self_key_BHTK=lay_out(layer.self_key_BHTK),
                self_value_BHTK=lay_out(layer.self_value_BHTK),
            )
            for layer in layers
        ]
        known_BT = jnp.pad(in_path_BD, ((0, 0), (0, more)), constant_values=True)
        past_B1T = mask_bias(known_BT)[:, None]
        return self._cache(layers, tokens_BS, known_BT.shape[1], past_B1T)

    def decoder_weights(self) -> DecoderWeights:
        """The decoder's weights as `decode_step` wants them; to be made once, before a loop.

        Inside it, every step would copy every weight.
        """
        tied = self.config.logits_via_embedding
        return DecoderWeights(
            [step_weights(self.decoder.layer(i)) for i in range(self.config.num_decoder_layers)],
            self.decoder.decoder_norm.scale[...],
            weight(self.token_embedder, self.config.dtype)
            if tied
            else weight(self.decoder.logits_dense, self.config.dtype).T,
        )

    def decode_step(
        self, weights: DecoderWeights, tokens_B, index, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """Logits [B, V] for the token after position `index`, which holds `tokens_B`."""
        x_MB = self.embed(tokens_B).T
        biases_1HT = [jax.lax.dynamic_index_in_dim(b, index) for b in cache.self_bias_THT]
        if cache.past_bias_B1T is not None:
            biases_1HT = [bias_1HT + cache.past_bias_B1T for bias_1HT in biases_1HT]
        if len(biases_1HT) == 1:
            biases_1HT = biases_1HT * len(weights.layers)
        new = []
        for layer, layer_cache, bias_1HT in zip(
            weights.layers, cache.layers, biases_1HT, strict=True
        ):
            x_MB, layer_cache = decode_layer(
                self.config, layer, x_MB, index, layer_cache, bias_1HT, cache.cross_bias_B1S
            )
            new.append(layer_cache)
        # The barrier keeps the transpose out of the product: see `decode_layer`.
        x_BM = jax.lax.optimization_barrier(self._scaled(rms_norm(x_MB.T, weights.norm_M)))
        logits_BV = jnp.einsum(
            "BM,VM->BV", x_BM, weights.logits_VM, preferred_element_type=jnp.float32
        )
        return logits_BV, cache._replace(layers=new)


def _segments(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
    return (tokens > 0).astype(jnp.int32) if segments is None else segments
