"""Oracles: hand calculations, and the definitions of Guo et al. 2017."""

import numpy as np
import pytest

from cosmo.tasks.metrics import safety, word_accuracy

ABC = ("a", "b", "c")


def test_confusion_by_hand():
    """Oracle: counted by hand; gold down, predicted across."""
    counts = safety.confusion(list("aabbbc"), list("abbbac"), ABC)
    assert counts.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 1]]
    assert safety.accuracy(counts) == pytest.approx(4 / 6)


def test_precision_recall_f1_by_hand():
    """Oracle: a: 2 of 4 predicted right, 2 of 3 gold found; c was never predicted, d never met."""
    counts = np.array([[2, 1, 0, 0], [1, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    a, b, c, d = safety.per_class(counts)
    f1 = pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    recall = pytest.approx(2 / 3)
    assert a == {"precision": 0.5, "recall": recall, "f1": f1, "gold": 3, "predicted": 4}
    assert b == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "gold": 4, "predicted": 4}
    assert c == {"precision": None, "recall": 0.0, "f1": 0.0, "gold": 1, "predicted": 0}
    assert d == {"precision": None, "recall": None, "f1": None, "gold": 0, "predicted": 0}
    assert safety.macro_f1(counts) == pytest.approx((4 / 7 + 0.75 + 0) / 3)


def test_calibration_error_by_hand():
    """Oracle: equation 3 with two bins: (2 * |1/2 - 0.4| + 3 * |3/3 - 0.8|) / 5 = 0.16.

    0.5 is on the edge, and belongs to the lower bin.
    """
    made = safety.calibration([0.3, 0.5, 0.6, 0.8, 1.0], [True, False, True, True, True], bins=2)
    assert made["error"] == pytest.approx(0.16)
    low, high = made["bins"]
    assert (low["from"], low["to"], low["examples"]) == (0.0, 0.5, 2)
    assert (low["accuracy"], low["confidence"]) == (0.5, pytest.approx(0.4))
    assert (high["examples"], high["accuracy"], high["confidence"]) == (3, 1.0, pytest.approx(0.8))


def test_calibrated_and_overconfident():
    """Oracle: who is right as often as he says has error 0; who is always sure, and half the time
    wrong, 0.5. 15 bins, the empty ones without numbers; 0 and 1 are in the first and the last.
    """
    assert safety.calibration([0.75] * 4, [True, True, True, False])["error"] == 0
    made = safety.calibration([1.0, 1.0, 0.0, 0.0], [True, False, False, False])
    assert made["error"] == pytest.approx(0.25)
    assert [row["examples"] for row in made["bins"]] == [2] + [0] * 13 + [2]
    assert made["bins"][7]["accuracy"] is None


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: safety.confusion(["a"], ["z"], ABC), "example 0: unknown label: got 'z'"),
        (lambda: safety.confusion([], []), "nothing to measure"),
        (lambda: safety.confusion(["a"], ["a", "b"], ABC), "expected equal lengths"),
        (lambda: safety.calibration([0.2, float("nan")], [True, True]), "not a probability"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words):
    """Oracle: got, expected."""
    with pytest.raises(ValueError, match=words):
        call()


def test_word_accuracy():
    """Oracle: by hand: "a" is right once of 2 named 3 times (F1 2/3), "b" 1 of 2 (2/3)."""
    found = word_accuracy(["a", "a", "b"], ["a", "b ", "b"])
    assert found == {"word_accuracy": pytest.approx(2 / 3), "word_macro_f1": pytest.approx(2 / 3)}
    assert word_accuracy(["a"], ["no word"]) == {"word_accuracy": 0.0, "word_macro_f1": 0.0}
