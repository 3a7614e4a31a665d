"""Token F1 and BLEU-4 of responses, number for number those of ParlAI 1.7.

Both compare texts in lower case, without punctuation and without the words a, an, the.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cosmo.tasks.metrics.checks import same_length

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_EPSILON = 1e-12  # stands in for zero matches of an n-gram length (Chen and Cherry 2014, method 1)
_LONGEST = 4  # n-grams of BLEU-4


def f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean token F1 of predictions against targets, 0 to 1."""
    same_length(targets=targets, predictions=predictions)
    return {
        "f1": float(np.mean([pair_f1(p, t) for t, p in zip(targets, predictions, strict=True)]))
    }


def bleu4(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean sentence BLEU-4 of predictions against targets, 0 to 1."""
    same_length(targets=targets, predictions=predictions)
    return {
        "bleu4": float(
            np.mean([pair_bleu4(p, t) for t, p in zip(targets, predictions, strict=True)])
        )
    }


def pair_f1(prediction: str, target: str) -> float:
    """Harmonic mean of token precision and recall, tokens counted with multiplicity."""
    guess, gold = _normal(prediction).split(), _normal(target).split()
    common = (Counter(guess) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(guess), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def pair_bleu4(prediction: str, target: str) -> float:
    """Sentence BLEU of n-grams up to 4 (Papineni et al. 2002) against one reference.

    Without a common word it is 0; an n-gram length without a match counts as 1e-12 matches.
    """
    # split(" "): an empty text is one empty word, as in the reference.
    guess, gold = _normal(prediction).split(" "), _normal(target).split(" ")
    logs = []
    for n in range(1, _LONGEST + 1):
        found = _ngrams(guess, n)
        matches = (found & _ngrams(gold, n)).total()
        if n == 1 and not matches:
            return 0.0
        logs.append(math.log((matches or _EPSILON) / max(1, found.total())))
    brevity = 1.0 if len(guess) > len(gold) else math.exp(1 - len(gold) / len(guess))
    return brevity * math.exp(math.fsum(logs) / _LONGEST)


def _normal(text: str) -> str:
    text = _PUNCTUATION.sub(" ", text.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
