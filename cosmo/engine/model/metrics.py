"""From sums on devices to numbers: everything is divided once, here, on the host."""

import math
from collections.abc import Iterable, Mapping

import numpy as np


def add(totals: dict[str, float], sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`totals` with `sums` added, as Python floats (so that long sums keep their precision)."""
    return {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}


def total(many: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The sums of many batches added up."""
    totals: dict[str, float] = {}
    for sums in many:
        totals = add(totals, sums)
    return totals


def language_model(totals: Mapping[str, float]) -> dict[str, float]:
    """Per-token numbers from the sums of `models.loss`: loss (nats), perplexity, accuracy."""
    tokens = max(totals["num_tokens"], 1.0)
    cross_entropy = totals["cross_entropy"] / tokens
    return {
        "loss": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "accuracy": totals["num_correct"] / tokens,
    }
