"""Sums from the devices to numbers for people.

Devices return sums and weights. Only here, on the host, are they divided, once: averages of
averages would weigh a token by the batch that it stands in.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

MAX_EXPONENT = 700.0  # exp of more overflows a float64, and Python raises an error


def add(totals: dict[str, float], sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return `totals` with `sums` added, as Python floats."""
    # Python's floats are float64: a sum over millions of tokens loses no precision.
    return {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}


def total(many: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Return the sums of many batches added up."""
    totals: dict[str, float] = {}
    for sums in many:
        totals = add(totals, sums)
    return totals


def language_model(totals: Mapping[str, float]) -> dict[str, float]:
    """Return loss (nats per token), perplexity and accuracy from the sums of `models.loss`."""
    tokens = max(totals["num_tokens"], 1.0)
    cross_entropy = totals["cross_entropy"] / tokens
    return {
        "loss": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, MAX_EXPONENT)),
        "accuracy": totals["num_correct"] / tokens,
    }
