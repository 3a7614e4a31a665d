"""Metrics of tasks whose target is one of a few words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmo.tasks.metrics.checks import same_length


def word_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return how often the word is right, and the mean F1 of the words that are targets, 0 to 1.

    The mean F1 counts each word alike, however rare it is.
    """
    same_length(targets=targets, predictions=predictions)
    pairs = [(t.strip(), p.strip()) for t, p in zip(targets, predictions, strict=True)]
    scores = []
    for word in sorted({target for target, _ in pairs}):
        right = sum(t == p == word for t, p in pairs)
        named = sum(t == word for t, _ in pairs) + sum(p == word for _, p in pairs)
        scores.append(2 * right / named)
    return {
        "word_accuracy": float(np.mean([t == p for t, p in pairs])),
        "word_macro_f1": float(np.mean(scores)),
    }
