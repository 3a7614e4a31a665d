"""Compute a model's loss and scores, as pure functions of (model, params, batch).

A batch has SeqIO's feature names: `encoder_input_tokens` [B, S], `decoder_input_tokens`,
`decoder_target_tokens`, `decoder_loss_weights` [B, T], and for packed rows `*_segment_ids`.
Parameters are a plain nested dict of arrays.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import SpecialIds
from cosmo.engine.model import losses

Params = dict[str, Any]
Batch = dict[str, jax.Array]


class NetworkConfig(Protocol):
    """The settings of a network. `t5.T5Config` explains those that both of ours have."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...]
    logits_via_embedding: bool
    logits_scale: float
    logits_bias: bool
    dropout_rate: float  # of embeddings and of what layers add
    inner_dropout_rate: float  # in attention, feed-forward layers and after a stack
    dropout_shared: bool  # whether all positions share one mask
    dtype: str
    product_dtype: str | None
    remat_policy: str
    attention: str
    scan_layers: bool
    # Positions: relative biases, or a table of so many rows that is added to embeddings.
    max_positions: int | None
    train_positions: bool
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    relative_attention_per_layer: bool
    # BlenderBot's norm subtracts the mean and, as its products, adds a bias; T5's do not.
    use_bias: bool
    special_ids: SpecialIds
    forbidden_ids: tuple[int, ...]  # tokens of probability 0, in training and generation

    def attention_fits(self, queries: int, keys: int) -> bool:
        """Return whether the kernel of attention has room for such lengths."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return the network with fresh parameters."""


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
    """A network and how its loss is measured. Field names are T5X's `EncoderDecoderModel`'s."""

    network: NetworkConfig
    z_loss: float = 0.0001  # of T5X's T5 recipes
    label_smoothing: float = 0.0
    loss_normalizing_factor: str | float | None = None

    def __post_init__(self):
        # A smoothed loss sums all logits, of which a forbidden token's is -1e20.
        if self.label_smoothing and self.network.forbidden_ids:
            raise UserError(
                f"label_smoothing={self.label_smoothing} with forbidden_ids="
                f"{self.network.forbidden_ids}: set one of them to 0 or ()",
                setting=("LABEL_SMOOTHING", "FORBIDDEN_IDS"),
            )


# Cached, because most functions below need it, and tracing the constructor takes time.
@functools.lru_cache(maxsize=16)
def _abstract(network: NetworkConfig):
    """Return (graph definition, abstract state) of a network."""
    # Any seed will do: nothing but shapes is traced.
    module = nnx.eval_shape(lambda: network.build(nnx.Rngs(0)))
    return nnx.split(module)


def init(model: EncoderDecoderModel, key: jax.Array) -> Params:
    """Return fresh parameters: a nested dict of float32 arrays. Works under `jax.jit`."""
    return nnx.to_pure_dict(nnx.state(model.network.build(nnx.Rngs(params=key)), nnx.Param))


def abstract_params(model: EncoderDecoderModel) -> Params:
    """Return shapes and types of the parameters, as `jax.ShapeDtypeStruct`s."""
    return nnx.to_pure_dict(_abstract(model.network)[1])


def parameter_count(model: EncoderDecoderModel) -> int:
    """Return the number of numbers in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))


def logical_axes(model: EncoderDecoderModel) -> Params:
    """Return the names of every parameter's axes, as tuples; a stack's start with "layers"."""
    _, state = _abstract(model.network)

    def names(path, variable):
        axes = variable.get_metadata("axes")
        # `transformer.stack` maps over layers after `layers.param` has named the other axes.
        stacked = len(variable.get_value().shape) == len(axes) + 1
        return ("layers", *axes) if stacked else axes

    return nnx.to_pure_dict(nnx.map_state(names, state))


def frozen(model: EncoderDecoderModel) -> Params:
    """Return bools: which parameters are not trained (their metadata has `trained=False`)."""
    _, state = _abstract(model.network)

    def is_frozen(path, variable):
        return not variable.get_metadata("trained", True)

    return nnx.to_pure_dict(nnx.map_state(is_frozen, state))


def bind(model: EncoderDecoderModel, params: Params) -> nnx.Module:
    """Return the network as a module over `params`."""
    return nnx.merge(_abstract(model.network)[0], params)


def logits(
    model: EncoderDecoderModel, params: Params, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """Return teacher-forced logits, float32 [B, T, V]; `key` turns dropout on."""
    return bind(model, params)(
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        batch.get("encoder_segment_ids"),
        batch.get("decoder_segment_ids"),
        key,
    )


def token_weights(batch: Batch) -> jax.Array:
    """Return float32 [B, T]: 1 where a target token counts."""
    # SeqIO's converter writes weights. Batches of inference have none: there padding alone is 0.
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] > 0
    return weights.astype(jnp.float32)


def loss(
    model: EncoderDecoderModel, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (weighted loss summed over the batch, the sums that a caller divides).

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
        # Unweighted by the normalization, so that perplexity means the same in every recipe.
        "cross_entropy": jnp.sum((per_token_BT - z_BT) * real_BT),
        "z_loss": jnp.sum(z_BT * real_BT),
        "num_tokens": jnp.sum(real_BT),
        "num_correct": jnp.sum(correct_BT),
    }
    return jnp.sum(per_token_BT * weights_BT), sums


def _is_best(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return whether no token scores above the target: bool [B, T]."""
    # Cheaper than an argmax. If tokens tie, each of them counts as the best.
    target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    return target_BT1[..., 0] >= jnp.max(logits_BTV, axis=-1)


def score(model: EncoderDecoderModel, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Return {"score", "num_tokens", "num_correct"}, each float32 [B].

    A score is the log-likelihood of a row's targets in nats, as T5X's `score_batch`.
    """
    logits_BTV = logits(model, params, batch)
    targets_BT = batch["decoder_target_tokens"]
    weights_BT = token_weights(batch)
    # Without label smoothing and z-loss: a log-likelihood, whatever the model was trained with.
    nll_BT, _ = losses.cross_entropy(logits_BTV, targets_BT)
    correct_BT = _is_best(logits_BTV, targets_BT)
    return {
        "score": -jnp.sum(nll_BT * weights_BT, axis=-1),
        "num_tokens": jnp.sum(weights_BT, axis=-1),
        "num_correct": jnp.sum(correct_BT * weights_BT, axis=-1),
    }
