"""What responses are like without comparing them: their diversity and length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmo.tasks.metrics.checks import same_length


def distinct(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Distinct-1 and distinct-2 of all predictions together. Li et al. 2016.

    Different n-grams over all n-grams, 0 to 1, on lower-case words split at white space; 0 where
    there is no n-gram. `targets` are not looked at.
    """
    same_length(targets=targets, predictions=predictions)
    words = [prediction.lower().split() for prediction in predictions]
    return {f"distinct_{n}": _distinct(words, n) for n in (1, 2)}


def response_length(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean number of words (split at white space) of a prediction; `targets` are not looked at."""
    same_length(targets=targets, predictions=predictions)
    return {"response_length": float(np.mean([len(text.split()) for text in predictions]))}


def _distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    ngrams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
