"""Compute the cross entropy on devices, and means from its sums on the host.

Devices return sums and weights, and only the host divides them, once.
"""

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cosmo.engine.base.errors import UserError

# Why division waits for the host: averages of averages would weigh a token by its batch.

# T5X's SpecialLossNormalizingFactor.
NORMALIZATIONS = (
    "NUM_REAL_TARGET_TOKENS",
    "NUM_TOTAL_TARGET_TOKENS",
    "AVERAGE_PER_SEQUENCE",
)


def cross_entropy(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each token and its z-loss part, both float32 [B, T], in nats.

    Label smoothing moves that much probability to the other tokens, evenly. The z-loss is
    `z_loss * log(Z) ** 2`. Source: T5X's `compute_weighted_cross_entropy`.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    if label_smoothing:
        vocab = logits_BTV.shape[-1]
        high, low = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
        expected_BT = (high - low) * target_BT + low * jnp.sum(logits_BTV, axis=-1)
        # The entropy of the smoothed target is subtracted, so that a perfect prediction costs 0.
        entropy = -(high * jnp.log(high) + (vocab - 1) * low * jnp.log(low + 1e-20))
        loss_BT = log_z_BT - expected_BT - entropy
    else:
        loss_BT = log_z_BT - target_BT
    # Keeps logits from drifting to where bfloat16 rounds them coarsely.
    z_BT = z_loss * jnp.square(log_z_BT)
    return loss_BT + z_BT, z_BT


def is_constant(normalization: str | float | None) -> bool:
    """Return whether the divisor is a number that does not depend on the batch."""
    return normalization is None or isinstance(normalization, int | float)


def loss_weights(
    normalization: str | float | None, weights_BT: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return (token weights [B, T], the divisor of the batch's loss).

    None: the plain sum. A number: divide by it. NUM_REAL_TARGET_TOKENS: the mean over target
    tokens. NUM_TOTAL_TARGET_TOKENS: over all positions, padding too. AVERAGE_PER_SEQUENCE: the mean
    over sequences (segments, where rows are packed) of each one's mean. Raises UserError for any
    other value. Source: T5X's `SpecialLossNormalizingFactor`.
    """
    # A divisor that is not constant is a sum over tokens, so microbatches add theirs and divide
    # once.
    if normalization is None:
        return weights_BT, jnp.float32(1.0)
    if normalization == "NUM_REAL_TARGET_TOKENS":
        return weights_BT, jnp.sum(weights_BT)
    if normalization == "NUM_TOTAL_TARGET_TOKENS":
        return weights_BT, jnp.float32(weights_BT.size)
    if normalization == "AVERAGE_PER_SEQUENCE":
        if segments_BT is None:
            segments_BT = jnp.ones(weights_BT.shape, jnp.int32)
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        tokens_BT = jnp.einsum("BTU,BU->BT", same_BTT.astype(weights_BT.dtype), weights_BT)
        # Padding and sequences without a target weigh nothing, and must not divide by zero.
        share_BT = jnp.where(weights_BT > 0, weights_BT / jnp.maximum(tokens_BT, 1e-9), 0.0)
        return share_BT, jnp.sum(share_BT)
    if isinstance(normalization, int | float):
        return weights_BT, jnp.float32(normalization)
    raise UserError(
        f"loss_normalizing_factor={normalization!r}; give None, a number or one of "
        f"{', '.join(NORMALIZATIONS)}",
        setting="LOSS_NORMALIZING_FACTOR",
    )


MAX_EXPONENT = 700.0  # exp of more overflows a float64, and Python raises an error


def total_sums(many: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Return the sums of many batches added up, as Python floats."""
    # Python's floats are float64: a sum over millions of tokens loses no precision.
    totals: dict[str, float] = {}
    for sums in many:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def per_token(totals: Mapping[str, float]) -> dict[str, float]:
    """Return loss (nats per token), perplexity and accuracy from the sums of `models.loss`."""
    tokens = max(totals["num_tokens"], 1.0)
    cross_entropy = totals["cross_entropy"] / tokens
    return {
        "loss": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, MAX_EXPONENT)),
        "accuracy": totals["num_correct"] / tokens,
    }
