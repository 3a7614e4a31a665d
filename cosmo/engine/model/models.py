"""What a model computes, as pure functions of (model, params, batch).

A batch has SeqIO's feature names: `encoder_input_tokens` [B, S], `decoder_input_tokens`,
`decoder_target_tokens`, `decoder_loss_weights` [B, T], and for packed rows `*_segment_ids`.
Parameters are a plain nested dict of arrays.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosmo.engine.model import decoding, losses
from cosmo.engine.model.choices import Tree, checked, tree_of

Params = dict[str, Any]
Batch = dict[str, jax.Array]


class NetworkConfig(Protocol):
    """Anything that builds a network; `t5.T5Config` is one."""

    vocab_size: int
    dtype: str
    dropout_rate: float

    def build(self, rngs: nnx.Rngs) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
    """A network and how its loss is measured. Field names are T5X's `EncoderDecoderModel`'s."""

    network: NetworkConfig
    z_loss: float = 0.0001
    label_smoothing: float = 0.0
    loss_normalizing_factor: str | float | None = None


@functools.lru_cache(maxsize=16)
def _abstract(network: NetworkConfig):
    module = nnx.eval_shape(lambda: network.build(nnx.Rngs(0)))
    return nnx.split(module)


def init(model: EncoderDecoderModel, key: jax.Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays. Safe to call under `jax.jit`."""
    return nnx.to_pure_dict(nnx.state(model.network.build(nnx.Rngs(params=key)), nnx.Param))


def abstract_params(model: EncoderDecoderModel) -> Params:
    """Shapes and types of the parameters, computed without memory: `jax.ShapeDtypeStruct`s."""
    return nnx.to_pure_dict(_abstract(model.network)[1])


def logical_axes(model: EncoderDecoderModel) -> Params:
    """The name of every axis of every parameter, as tuples; a stacked one starts with "layers"."""
    _, state = _abstract(model.network)

    def names(path, variable):
        axes = variable.get_metadata("axes")
        stacked = len(variable.get_value().shape) == len(axes) + 1
        return ("layers", *axes) if stacked else axes

    return nnx.to_pure_dict(nnx.map_state(names, state))


def bind(model: EncoderDecoderModel, params: Params) -> nnx.Module:
    """The network as a module over `params`."""
    return nnx.merge(_abstract(model.network)[0], params)


def logits(
    model: EncoderDecoderModel, params: Params, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """Teacher-forced logits, float32 [B, T, V]; `key` turns dropout on."""
    return bind(model, params)(
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        batch.get("encoder_segment_ids"),
        batch.get("decoder_segment_ids"),
        key,
    )


def token_weights(batch: Batch) -> jax.Array:
    """float32 [B, T]: 1 where a target token counts."""
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] > 0
    return weights.astype(jnp.float32)


def loss(
    model: EncoderDecoderModel, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted loss summed over the batch, and the sums that a caller divides.

    The sums: `loss_weight` (divide the loss by it, after adding up microbatches), `cross_entropy`
    (nats, no z-loss), `z_loss`, `num_tokens`, `num_correct` (target tokens).
    """
    logits_BTV = logits(model, params, batch, key)
    targets_BT = batch["decoder_target_tokens"]
    real_BT = token_weights(batch)
    per_token_BT, z_BT = losses.cross_entropy(
        logits_BTV, targets_BT, label_smoothing=model.label_smoothing, z_loss=model.z_loss
    )
    weights_BT, total = losses.loss_weights(
        model.loss_normalizing_factor, real_BT, batch.get("decoder_segment_ids")
    )
    correct_BT = _is_best(logits_BTV, targets_BT) * real_BT
    sums = {
        "loss_weight": total,
        "cross_entropy": jnp.sum((per_token_BT - z_BT) * real_BT),
        "z_loss": jnp.sum(z_BT * real_BT),
        "num_tokens": jnp.sum(real_BT),
        "num_correct": jnp.sum(correct_BT),
    }
    return jnp.sum(per_token_BT * weights_BT), sums


def _is_best(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Whether no token scores above the target: bool [B, T]. (Cheaper than an argmax.)"""
    target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    return target_BT1[..., 0] >= jnp.max(logits_BTV, axis=-1)


def score(model: EncoderDecoderModel, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Per row: `score` (log-likelihood of the targets in nats), `num_tokens`, `num_correct` [B]."""
    logits_BTV = logits(model, params, batch)
    targets_BT = batch["decoder_target_tokens"]
    weights_BT = token_weights(batch)
    nll_BT, _ = losses.cross_entropy(logits_BTV, targets_BT)
    correct_BT = _is_best(logits_BTV, targets_BT)
    return {
        "score": -jnp.sum(nll_BT * weights_BT, axis=-1),
        "num_tokens": jnp.sum(weights_BT, axis=-1),
        "num_correct": jnp.sum(correct_BT * weights_BT, axis=-1),
    }


def predict(
    model: EncoderDecoderModel,
    params: Params,
    encoder_input_tokens: jax.Array,
    config: decoding.DecodingConfig,
    row_keys: jax.Array | None = None,
) -> decoding.Decoded:
    """Generate for each row of `encoder_input_tokens` [B, S]; see `decoding.decode`.

    `row_keys` [B] are one random key a row, so that an answer does not depend on its batch.
    """
    # Cast and unstack once: inside the loop either would be paid for every token.
    module = bind(model, _cast(params, model.network.dtype))
    weights = module.decoder_weights()
    cache = module.start_cache(encoder_input_tokens, config.max_new_tokens)

    def step(tokens, index, cache):
        return module.decode_step(weights, tokens, index, cache)

    return decoding.decode(step, cache, encoder_input_tokens.shape[0], config, row_keys)


def score_choices(
    model: EncoderDecoderModel,
    params: Params,
    encoder_input_tokens: jax.Array,
    choices: Sequence[Sequence[int]],
) -> jax.Array:
    """The log-likelihood in nats of each of C choices after each input [B, S]: float32 [B, C].

    Exact, as `score` gives it for targets of exactly these tokens: a choice that is to be all of an
    answer ends in EOS. `choices` are known when this is compiled: tokens, padded with 0 or not. An
    input is encoded once, and what choices share at their beginning is decoded once.
    """
    tree = tree_of(checked(choices, model.network.vocab_size))
    module = bind(model, params)
    hidden_BNM, _ = module.read_tree(encoder_input_tokens, tree)
    return _choice_scores(module, hidden_BNM, tree)


def _choice_scores(module: nnx.Module, hidden_BNM: jax.Array, tree: Tree) -> jax.Array:
    logits_BNV = module.logits(hidden_BNM)
    log_z_BN = jax.nn.logsumexp(logits_BNV, axis=-1)
    edges_BE = logits_BNV[:, tree.parents_E, tree.tokens_E] - log_z_BN[:, tree.parents_E]
    return jnp.sum(edges_BE[:, :, None] * tree.on_path_EC.astype(np.float32), axis=1)


class Chosen(NamedTuple):
    """`scores` float32 [B, C] of the choices in nats; `choice` int32 [B], the one taken; and the
    text after it, `continuation`, whose scores are of its own tokens alone."""

    scores: jax.Array
    choice: jax.Array
    continuation: decoding.Decoded


def choose_and_continue(
    model: EncoderDecoderModel,
    params: Params,
    encoder_input_tokens: jax.Array,
    choices: Sequence[Sequence[int]],
    config: decoding.DecodingConfig,
    row_keys: jax.Array | None = None,
    continues: Sequence[bool] | None = None,
) -> Chosen:
    """Score the choices as `score_choices`, take the best one, and generate what follows it.

    All from one encoder pass; a choice's tokens are not decoded again. After a choice whose
    `continues` is False (by default: that ends in EOS) nothing is generated: the text is empty, its
    score 0.
    """
    tree = tree_of(checked(choices, model.network.vocab_size))
    if continues is None:
        continues = tree.last_C != decoding.EOS
    elif len(continues) != len(tree.last_C):
        raise ValueError(f"{len(continues)} values of `continues` for {len(tree.last_C)} choices")
    module = bind(model, _cast(params, model.network.dtype))
    hidden_BNM, layers = module.read_tree(encoder_input_tokens, tree)
    scores_BC = _choice_scores(module, hidden_BNM, tree)
    choice_B = _likeliest(scores_BC)
    path_BD, in_path_BD = (
        jnp.asarray(tree.path_CD)[choice_B],
        jnp.asarray(tree.in_path_CD)[choice_B],
    )
    cache = module.resume(layers, encoder_input_tokens, path_BD, in_path_BD, config.max_new_tokens)
    weights, begin = module.decoder_weights(), path_BD.shape[1]

    def step(tokens, index, cache):
        return module.decode_step(weights, tokens, begin + index, cache)

    found = decoding.decode(
        step,
        cache,
        encoder_input_tokens.shape[0],
        config,
        row_keys,
        first_B=jnp.asarray(tree.last_C)[choice_B],
        ended_B=~jnp.asarray(continues, bool)[choice_B],
    )
    return Chosen(scores_BC, choice_B, found)


def _likeliest(scores_BC: jax.Array) -> jax.Array:
    # A function of its own, so that tests can take every choice.
    return jnp.argmax(scores_BC, axis=-1).astype(jnp.int32)


def _cast(params: Params, dtype: str) -> Params:
    """Parameters in the compute type, but for the relative bias: it is added in float32."""

    def cast(path, array):
        keep = any(getattr(entry, "key", None) == "relpos_bias" for entry in path)
        return array if keep else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
