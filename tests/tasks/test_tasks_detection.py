"""Measures of binary detection."""

import importlib.util

import numpy as np
import pytest

from cosmo.tasks.metrics import detection, intervals
from tests import lazily

stats = lazily.importorskip("scipy.stats")

# By hand: four thresholds. Flagged (unsafe, safe): .9 (1, 0), .7 (1, 1), .5 (2, 2), .2 (3, 3).
GOLD = [True, False, True, False, True, False]
SCORES = [0.9, 0.7, 0.5, 0.5, 0.2, 0.2]


def examples(seed: int, count: int = 300):
    """Gold answers and scores that tie often."""
    random = np.random.default_rng(seed)
    gold = random.random(count) < 0.3
    return gold, np.round(0.8 * gold + random.normal(size=count), 1)


def test_by_hand():
    """Oracle: pairs and steps, by hand."""
    # Pairs won: .9 three; .5 one tie and one win; .2 one tie.
    assert detection.roc_auc(GOLD, SCORES) == pytest.approx((3 + 1.5 + 0.5) / 9)
    assert detection.average_precision(GOLD, SCORES) == pytest.approx((1 + 2 / 4 + 3 / 6) / 3)
    assert detection.false_positive_rate_at(2 / 3, GOLD, SCORES) == pytest.approx(2 / 3)
    assert detection.false_positive_rate_at(0.3, GOLD, SCORES) == 0
    assert detection.recall_at(0.0, GOLD, SCORES) == pytest.approx(1 / 3)
    assert detection.recall_at(0.7, GOLD, SCORES) == pytest.approx(2 / 3)
    assert detection.recall_at(0.0, [True, False], [0.1, 0.9]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_roc_auc_is_mann_whitneys_u(seed):
    """Oracle: scipy's U over the number of pairs."""
    gold, scores = examples(seed)
    u = stats.mannwhitneyu(scores[gold], scores[~gold]).statistic
    assert detection.roc_auc(gold, scores) == pytest.approx(u / (gold.sum() * (~gold).sum()))


def test_the_interval_of_roc_auc_covers_its_mean():
    """Property: of 400 samples of one distribution, about 95% have the true area inside."""
    # The area of two normal distributions one standard deviation apart.
    true = stats.norm.cdf(1 / np.sqrt(2))
    random, inside = np.random.default_rng(1), 0
    for _ in range(400):
        gold = np.arange(120) < 50
        low, high = detection.roc_auc_interval(gold, gold + random.normal(size=120))
        inside += low <= true <= high
    assert stats.binomtest(inside, 400, 0.95).pvalue > 0.001


@pytest.mark.parametrize(("hits", "total"), [(0, 7), (5, 20), (7, 7), (430, 1000)])
def test_wilsons_interval(hits, total):
    """Oracle: scipy."""
    wanted = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert intervals.wilson(hits, total) == pytest.approx((wanted.low, wanted.high))


def test_what_is_not_defined_is_none():
    """Oracle: the docstrings. One class has no curve, no trial no share."""
    for gold in ([True, True], [False, False]):
        assert detection.roc_auc(gold, [0.1, 0.2]) is None
        assert detection.roc_auc_interval(gold, [0.1, 0.2]) is None
        assert detection.false_positive_rate_at(0.9, gold, [0.1, 0.2]) is None
        assert detection.recall_at(0.1, gold, [0.1, 0.2]) is None
    assert detection.average_precision([False], [0.5]) is None
    assert intervals.wilson(0, 0) is None
    with pytest.raises(ValueError, match="scores"):
        detection.roc_auc([True], [0.1, 0.2])


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn is missing")
@pytest.mark.parametrize("seed", range(3))
def test_beside_scikit_learn(seed):
    """Oracle: scikit-learn."""
    from sklearn import metrics

    gold, scores = examples(seed)
    assert detection.roc_auc(gold, scores) == pytest.approx(metrics.roc_auc_score(gold, scores))
    wanted = metrics.average_precision_score(gold, scores)
    assert detection.average_precision(gold, scores) == pytest.approx(wanted)
    rates, recalls, _ = metrics.roc_curve(gold, scores, drop_intermediate=False)
    assert detection.recall_at(0.1, gold, scores) == pytest.approx(recalls[rates <= 0.1].max())
    wanted = rates[recalls >= 0.9].min()
    assert detection.false_positive_rate_at(0.9, gold, scores) == pytest.approx(wanted)
