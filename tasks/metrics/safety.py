"""How well dialogue safety labels were found: tables of counts, and what follows from them.

Labels are those of `cosmo.tasks.safety`, five (LABELS) or three (CLASSES), in order of severity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cosmo.tasks.metrics.checks import same_length
from cosmo.tasks.safety import LABELS


def confusion(
    golds: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = LABELS
) -> np.ndarray:
    """How often gold label i was taken for label j: int64 [C, C], gold down, predicted across.

    Raises ValueError for lists that do not match and for a label that is not of `labels`.
    """
    same_length(golds=golds, predicted=predicted)
    number = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for place, pair in enumerate(zip(golds, predicted, strict=True)):
        for label in pair:
            if label not in number:
                raise ValueError(
                    f"example {place}: unknown label: got {label!r}, expected one of {list(labels)}"
                )
        counts[number[pair[0]], number[pair[1]]] += 1
    return counts


def accuracy(counts: np.ndarray) -> float:
    """The share of examples on the diagonal of a confusion matrix, 0 to 1."""
    return float(np.trace(counts) / counts.sum())


def per_class(counts: np.ndarray) -> list[dict[str, float | int | None]]:
    """Of each label: precision, recall, f1 (0 to 1), and how often it was gold and predicted.

    Precision is None for a label that was never predicted, recall for one that never was gold, and
    F1, 2 TP / (2 TP + FP + FN), for one that was neither.
    """
    right, gold, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    return [
        {
            "precision": _share(right[i], predicted[i]),
            "recall": _share(right[i], gold[i]),
            "f1": _share(2 * right[i], gold[i] + predicted[i]),
            "gold": int(gold[i]),
            "predicted": int(predicted[i]),
        }
        for i in range(len(counts))
    ]


def macro_f1(counts: np.ndarray) -> float:
    """Mean F1 of the labels that are gold or predicted at least once, each weighing the same."""
    return float(np.mean([row["f1"] for row in per_class(counts) if row["f1"] is not None]))


def calibration(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = 15
) -> dict[str, Any]:
    """Expected calibration error, and the reliability diagram that it sums up.

    Guo et al. 2017, equation 3: examples are put into M = `bins` intervals of equal width,
    ((m - 1) / M, m / M], by the probability of the label that was chosen; the error is the mean
    over examples of |accuracy - mean confidence| of their interval, 0 to 1. 15 is the paper's M.

    Returns {"error": float, "bins": one {"from", "to", "examples", "accuracy", "confidence"} for
    each interval; the last two are None where it is empty}. Raises ValueError for a confidence
    that is no probability.
    """
    same_length(confidences=confidences, correct=correct)
    confidence, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        wrong = confidence[~((confidence >= 0) & (confidence <= 1))][0]
        raise ValueError(f"not a probability: got {wrong}, expected a number from 0 to 1")
    edges = np.arange(bins + 1) / bins
    # side="left": a confidence on an edge belongs to the interval below it, and 0 to the first.
    place = np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)
    examples = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, values, bins) for values in (right, confidence)]
    error = np.abs(sums[0] - sums[1]).sum() / len(confidence)
    diagram = [
        {
            "from": float(edges[m]),
            "to": float(edges[m + 1]),
            "examples": int(examples[m]),
            "accuracy": _share(sums[0][m], examples[m]),
            "confidence": _share(sums[1][m], examples[m]),
        }
        for m in range(bins)
    ]
    return {"error": float(error), "bins": diagram}


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
