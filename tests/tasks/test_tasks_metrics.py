"""Oracles: ParlAI's recorded numbers, and hand calculations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cosmo.tasks import metrics

_SMALL = Path(__file__).resolve().parents[1] / "golden/metrics_small.json"


def _check(golden):
    pairs = golden["pairs"]
    for pair in pairs:
        texts = (pair["prediction"], pair["target"])
        assert metrics.pair_f1(*texts) == pytest.approx(pair["f1"], rel=1e-9, abs=0)
        assert metrics.pair_bleu4(*texts) == pytest.approx(pair["bleu4"], rel=1e-9, abs=0)
    targets = [pair["target"] for pair in pairs]
    predictions = [pair["prediction"] for pair in pairs]
    assert metrics.f1(targets, predictions) == {"f1": pytest.approx(golden["mean_f1"], rel=1e-9)}
    bleu = metrics.bleu4(targets, predictions)
    assert bleu == {"bleu4": pytest.approx(golden["mean_bleu4"], rel=1e-9)}


def test_f1_and_bleu4_equal_parlai_on_40_pairs():
    """Oracle: ParlAI 1.7's recorded numbers, to 1e-9."""
    _check(json.loads(_SMALL.read_text()))


def test_f1_and_bleu4_equal_parlai_on_200_pairs(shared):
    """Oracle: ParlAI 1.7's recorded numbers, to 1e-9."""
    _check(json.loads((shared / "golden/metrics.json").read_text()))


def test_empty_texts_score_zero():
    """Oracle: no word in common."""
    for pair in (("", "hello"), ("hello", ""), ("the", "a b")):
        assert metrics.pair_f1(*pair) == metrics.pair_bleu4(*pair) == 0.0


def test_f1_by_hand():
    """Oracle: 2 of 3 words right, 2 of 4 found: 2 * (2/3) * (1/2) / (2/3 + 1/2) = 4/7."""
    assert metrics.pair_f1("The cat, sat down!", "a cat sat on it") == pytest.approx(4 / 7)


def test_distinct_by_hand():
    """Oracle: words a b a b a: 2 of 5 unigrams; bigrams ab ba ab within texts: 2 of 3."""
    got = metrics.distinct(["", ""], ["a b a b", "A"])
    assert got == {"distinct_1": pytest.approx(2 / 5), "distinct_2": pytest.approx(2 / 3)}
    assert metrics.distinct([""], ["one"])["distinct_2"] == 0.0


def test_response_length_by_hand():
    """Oracle: three and one words."""
    assert metrics.response_length(["", ""], ["a b c", "d"]) == {"response_length": 2.0}


def test_perplexity_and_accuracy_by_hand():
    """Oracle: uniform guesses over 7 tokens have perplexity 7; 3 of 5 tokens right."""
    aux = {"num_tokens": [2, 3], "num_correct": [2, 1]}
    scores = [2 * math.log(1 / 7), 3 * math.log(1 / 7)]
    assert metrics.perplexity(["x", "y"], scores, aux)["perplexity"] == pytest.approx(7)
    assert metrics.token_accuracy(["x", "y"], scores, aux) == {"token_accuracy": 0.6}
    pair = (np.array(scores), {name: np.array(counts) for name, counts in aux.items()})
    assert metrics.perplexity(["x", "y"], pair)["perplexity"] == pytest.approx(7)


def test_scores_without_counts_are_refused():
    """Oracle: the words of the error."""
    with pytest.raises(ValueError, match=r"mixtures\.use with token_metrics=False"):
        metrics.perplexity(["x"], [-1.0])
    with pytest.raises(ValueError, match="0 target tokens"):
        metrics.perplexity(["x"], [-1.0], {"num_tokens": [0]})
    assert metrics.perplexity(["x"], [-1e6], {"num_tokens": [1]})["perplexity"] == math.inf


@pytest.mark.parametrize(
    "metric", [metrics.f1, metrics.bleu4, metrics.distinct, metrics.response_length]
)
def test_nothing_and_uneven_lists_are_refused(metric):
    """Oracle: the words of the error."""
    with pytest.raises(ValueError, match="nothing to measure"):
        metric([], [])
    with pytest.raises(ValueError, match="do not match"):
        metric(["a"], ["a", "b"])
