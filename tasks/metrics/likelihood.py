"""Compute perplexity and token accuracy from per-example scores.

`scores[i]` is the natural-log likelihood of target i, summed over its tokens. `aux_values` holds
per-example counts: `num_tokens` (target tokens, EOS among them) and `num_correct` (those that the
model ranks first). `scores` may also be the pair (scores, aux_values), as in SeqIO's evaluator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosmo.tasks.metrics.checks import same_length


def perplexity(
    targets: Sequence[Any], scores: Any, aux_values: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Return exp of the mean negative log-likelihood per target token over all examples."""
    scores, (num_tokens,) = _unpack(targets, scores, aux_values, ("num_tokens",))
    # Over tokens, as the loss, so that long responses weigh more. fsum, because a plain sum of many
    # likelihoods loses digits.
    nats = -math.fsum(scores) / num_tokens.sum()
    # Infinity and no error, because a diverged model's perplexity is a number to report.
    return {"perplexity": math.exp(nats) if nats < 700 else math.inf}


def token_accuracy(
    targets: Sequence[Any], scores: Any, aux_values: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Return the share of all target tokens that the model ranks first, 0 to 1."""
    wanted = ("num_tokens", "num_correct")
    _, (num_tokens, num_correct) = _unpack(targets, scores, aux_values, wanted)
    return {"token_accuracy": float(num_correct.sum() / num_tokens.sum())}


def _unpack(
    targets: Sequence[Any], scores: Any, aux_values: Mapping[str, Any] | None, names: Sequence[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return (scores, the counts called `names`) as float64 vectors; raise ValueError."""
    if aux_values is None and isinstance(scores, tuple) and len(scores) == 2:
        scores, aux_values = scores
    for name in names:
        if aux_values is None or name not in aux_values:
            raise ValueError(
                f"a score needs counts per example: got aux_values with "
                f"{sorted(aux_values or ())}, expected {list(names)}. A model that gives none is "
                "evaluated without them (mixtures.use with token_metrics=False)"
            )
    # float32 holds whole numbers up to 2**24 only, fewer than a corpus has tokens.
    columns = {name: np.asarray(aux_values[name], np.float64) for name in names}
    scores = np.asarray(scores, np.float64)
    same_length(targets=targets, scores=scores, **columns)
    if columns["num_tokens"].sum() <= 0:
        raise ValueError("nothing to measure: got 0 target tokens, expected at least 1")
    return scores, list(columns.values())
