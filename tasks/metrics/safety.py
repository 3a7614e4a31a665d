"""Measure safety labels and rules of thumb (RoTs): from tables of counts, or from Canary's texts.

Labels are those of `cosmo.tasks.safety`, five (LABELS) or three (CLASSES), in order of severity.

`targets` of the metrics of texts are as `safety.target` writes them, in either label style. A
prediction that starts with no label has none: its label counts as wrong, and all of it is RoT text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cosmo.tasks.metrics.checks import same_length
from cosmo.tasks.metrics.responses import bleu4, f1
from cosmo.tasks.safety import LABELS, STYLES, parse_answer, three_class


def confusion(
    golds: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = LABELS
) -> np.ndarray:
    """Return how often gold label i was taken for label j: int64 [C, C], gold down.

    Raises ValueError for lists that do not match and for a label that is not of `labels`.
    """
    same_length(golds=golds, predicted=predicted)
    number = {label: index for index, label in enumerate(labels)}
    # Over all labels, so that one that never occurs has its row and column too.
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
    """Return the share of examples on the diagonal of a confusion matrix, 0 to 1."""
    return float(np.trace(counts) / counts.sum())


def per_class(counts: np.ndarray) -> list[dict[str, float | int | None]]:
    """Return each label's precision, recall, f1 (0 to 1), and its counts as gold and predicted.

    Precision is None for a label that was never predicted, and recall for one that never was gold.
    F1, 2 TP / (2 TP + FP + FN), is None for one that was neither.
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
    """Return the mean F1 of the labels that are gold or predicted at least once."""
    # A label that never occurs has no F1, and 0 would lower the mean.
    return float(np.mean([row["f1"] for row in per_class(counts) if row["f1"] is not None]))


def calibration(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = 15
) -> dict[str, Any]:
    """Return the expected calibration error, and the reliability diagram that it sums up.

    Guo et al. 2017, equation 3. The chosen label's probability puts an example into one of
    M = `bins` intervals ((m - 1) / M, m / M]. The error is the mean
    over examples of |accuracy - mean confidence| of their interval, 0 to 1. 15 is the paper's M.

    The result is {"error": float, "bins": one {"from", "to", "examples", "accuracy", "confidence"}
    for each interval}; the last two are None if it is empty. Raises ValueError for a confidence
    that is not a probability.
    """
    same_length(confidences=confidences, correct=correct)
    confidence, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        wrong = confidence[~((confidence >= 0) & (confidence <= 1))][0]
        raise ValueError(f"not a probability: got {wrong}, expected a number from 0 to 1")
    edges = np.arange(bins + 1) / bins
    # side="left", because a confidence on an edge belongs to the interval below it.
    place = np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)
    examples = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, values, bins) for values in (right, confidence)]
    # A difference of sums is the interval's |accuracy - confidence|, weighted by its examples.
    error = np.abs(sums[0] - sums[1]).sum() / len(confidence)
    diagram = [
        {
            "from": float(edges[m]),
            "to": float(edges[m + 1]),
            # Plain numbers, because the report is written as JSON.
            "examples": int(examples[m]),
            "accuracy": _share(sums[0][m], examples[m]),
            "confidence": _share(sums[1][m], examples[m]),
        }
        for m in range(bins)
    ]
    return {"error": float(error), "bins": diagram}


# None and not 0, because a label without examples must not lower a mean.
def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def label_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return how often the label is right (of five; of three classes) and written, 0 to 1.

    Raises ValueError for a target without a label.
    """
    same_length(targets=targets, predictions=predictions)
    gold = [_gold(target)[0] for target in targets]
    written = [_parsed(prediction)[0] for prediction in predictions]
    pairs = list(zip(gold, written, strict=True))
    # An answer without a label is wrong in three classes too.
    classes = [w is not None and three_class(g) == three_class(w) for g, w in pairs]
    return {
        "label_accuracy": float(np.mean([g == w for g, w in pairs])),
        "class_accuracy": float(np.mean(classes)),
        "label_written": float(np.mean([w is not None for _, w in pairs])),
    }


def rot_overlap(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return the mean BLEU-4 and token F1 of RoT texts, over the examples whose target has RoTs.

    If none has, only `rot_examples`, their number, is there. A prediction without RoTs counts 0.
    """
    same_length(targets=targets, predictions=predictions)
    gold = [_gold(target)[1] for target in targets]
    written = [_parsed(prediction)[1] for prediction in predictions]
    # A casual target has no rules of thumb that a prediction could match.
    pairs = [(g, w) for g, w in zip(gold, written, strict=True) if g]
    # A mean over nothing would be NaN, and would spoil a curve.
    if not pairs:
        return {"rot_examples": 0.0}
    rots, guesses = (list(column) for column in zip(*pairs, strict=True))
    return {
        "rot_bleu4": bleu4(rots, guesses)["bleu4"],
        "rot_f1": f1(rots, guesses)["f1"],
        "rot_examples": float(len(pairs)),
    }


def _parsed(text: str) -> tuple[str | None, str]:
    # Both styles, because a metric does not know in which one its checkpoint was trained.
    found = (parse_answer(text, style) for style in STYLES)
    return next((pair for pair in found if pair[0] is not None), (None, text.strip()))


def _gold(target: str) -> tuple[str, str]:
    label, rots = _parsed(target)
    if label is None:
        raise ValueError(f"a target without a safety label: got {target!r}")
    return label, rots
