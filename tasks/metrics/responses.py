"""Measure generated responses: token F1, BLEU-4, distinct-n and length.

F1 and BLEU-4 are number for number those of ParlAI 1.7. They compare texts in lower case, without
punctuation and without the words a, an, the.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from cosmo.tasks.metrics.checks import same_length

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_EPSILON = 1e-12  # stands in for zero matches of an n-gram length (Chen and Cherry 2014, method 1)
_LONGEST = 4  # n-grams of BLEU-4


def f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return the mean token F1 of predictions against targets, 0 to 1."""
    return {"f1": _mean(pair_f1, targets, predictions)}


def bleu4(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return the mean sentence BLEU-4 of predictions against targets, 0 to 1."""
    return {"bleu4": _mean(pair_bleu4, targets, predictions)}


def _mean(
    pair: Callable[[str, str], float], targets: Sequence[str], predictions: Sequence[str]
) -> float:
    same_length(targets=targets, predictions=predictions)
    return float(np.mean([pair(p, t) for t, p in zip(targets, predictions, strict=True)]))


def pair_f1(prediction: str, target: str) -> float:
    """Return the harmonic mean of token precision and recall, tokens counted with multiplicity."""
    guess, gold = _normal(prediction).split(), _normal(target).split()
    common = (Counter(guess) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(guess), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def pair_bleu4(prediction: str, target: str) -> float:
    """Return the sentence BLEU of n-grams up to 4 (Papineni et al. 2002) against one reference.

    Without a common word it is 0. An n-gram length without a match counts as 1e-12 matches.
    """
    # split(" "), because an empty text is one empty word in ParlAI.
    guess, gold = _normal(prediction).split(" "), _normal(target).split(" ")
    logs = []
    for n in range(1, _LONGEST + 1):
        found = _ngrams(guess, n)
        matches = (found & _ngrams(gold, n)).total()
        if n == 1 and not matches:
            return 0.0
        logs.append(math.log((matches or _EPSILON) / max(1, found.total())))
    # Where the lengths are equal both forms give 1.
    brevity = 1.0 if len(guess) > len(gold) else math.exp(1 - len(gold) / len(guess))
    # The mean of logarithms is the geometric mean.
    return brevity * math.exp(math.fsum(logs) / _LONGEST)


def distinct(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return distinct-1 and distinct-2 of all predictions together. Li et al. 2016.

    Different n-grams over all n-grams, 0 to 1, on lower-case words split at white space; 0 if there
    is no n-gram. `targets` are not used.
    """
    same_length(targets=targets, predictions=predictions)
    words = [prediction.lower().split() for prediction in predictions]
    return {f"distinct_{n}": _distinct(words, n) for n in (1, 2)}


def response_length(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return the mean number of words (split at white space); `targets` are not used."""
    same_length(targets=targets, predictions=predictions)
    return {"response_length": float(np.mean([len(text.split()) for text in predictions]))}


def _distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    ngrams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


# ParlAI's normalize_answer.
def _normal(text: str) -> str:
    # A space, so that "well-known" becomes two words.
    text = _PUNCTUATION.sub(" ", text.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
