"""Metrics of what Canary wrote: its label and its rules of thumb (RoTs), read from the text.

`targets` are texts as `safety.target` writes them, in either label style. A prediction that
starts with no label has none: its label counts as wrong, and all of it is RoT text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmo.tasks.metrics.checks import same_length
from cosmo.tasks.metrics.overlap import bleu4, f1
from cosmo.tasks.safety import STYLES, parse, three_class


def label_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """How often the label is right (of five; of three classes), how often there is one; 0 to 1.

    Raises ValueError for a target without a label.
    """
    same_length(targets=targets, predictions=predictions)
    gold = [_gold(target)[0] for target in targets]
    written = [_parsed(prediction)[0] for prediction in predictions]
    pairs = list(zip(gold, written, strict=True))
    classes = [w is not None and three_class(g) == three_class(w) for g, w in pairs]
    return {
        "label_accuracy": float(np.mean([g == w for g, w in pairs])),
        "class_accuracy": float(np.mean(classes)),
        "label_written": float(np.mean([w is not None for _, w in pairs])),
    }


def rot_overlap(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean sentence BLEU-4 and token F1 of RoT texts, over the examples whose target has RoTs.

    Where none has, only `rot_examples`, their number, is given. A prediction without RoTs counts 0.
    """
    same_length(targets=targets, predictions=predictions)
    gold = [_gold(target)[1] for target in targets]
    written = [_parsed(prediction)[1] for prediction in predictions]
    pairs = [(g, w) for g, w in zip(gold, written, strict=True) if g]
    if not pairs:
        return {"rot_examples": 0.0}
    rots, guesses = (list(column) for column in zip(*pairs, strict=True))
    return {
        "rot_bleu4": bleu4(rots, guesses)["bleu4"],
        "rot_f1": f1(rots, guesses)["f1"],
        "rot_examples": float(len(pairs)),
    }


def _parsed(text: str) -> tuple[str | None, str]:
    found = (parse(text, style) for style in STYLES)
    return next((pair for pair in found if pair[0] is not None), (None, text.strip()))


def _gold(target: str) -> tuple[str, str]:
    label, rots = _parsed(target)
    if label is None:
        raise ValueError(f"a target without a safety label: got {target!r}")
    return label, rots
