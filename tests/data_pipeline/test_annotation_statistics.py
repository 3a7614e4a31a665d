"""Oracles: scipy, statsmodels 0.15 (its printed results), the krippendorff package, the papers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmo.tasks.metrics import agreement, intervals
from cosmo.tasks.paper_tables import SODA
from data_pipeline.annotation import statistics as s
from tests import lazily

stats = lazily.importorskip("scipy.stats")

COUNTS = [(366, 234), (0, 5), (5, 0), (1, 1), (3, 9), (40, 60), (901, 899), (0, 0)]


@pytest.mark.parametrize(("first", "second"), COUNTS)
def test_the_sign_test_is_scipys_exact_binomial_test(first, second):
    """Oracle: scipy.stats.binomtest; statsmodels' exact McNemar gives 7.92e-08 for 366:234."""
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert s.sign_test(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "total"), [(366, 600), (0, 5), (5, 5), (1, 3), (37, 100)])
def test_wilson_is_scipys(count, total):
    """Oracle: scipy; statsmodels gives (0.57039, 0.64821) for 366 of 600."""
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    assert intervals.wilson(count, total) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert intervals.wilson(0, 0) is None


def test_z_of_the_papers_form_and_the_right_one():
    """Oracle: the paper's |z| > 7.6 for 61:39; statsmodels' proportions_ztest and McNemar."""
    assert s.two_proportion_z(366, 234, 600) == pytest.approx(7.621023553303059)
    assert s.p_of_z(7.621023553303059) == pytest.approx(2.5167201249441937e-14)
    assert s.one_sample_z(366, 234) == pytest.approx(5.388877434122992)
    # Table 6, and the factor between both: the square root of 2 without ties.
    assert s.two_proportion_z(180, 120, 300) == pytest.approx(4.90, abs=0.005)
    assert s.two_proportion_z(180, 120, 300) / s.one_sample_z(180, 120) == pytest.approx(
        math.sqrt(2) / math.sqrt(0.9999999999), abs=1e-6
    )
    for nothing in (s.two_proportion_z(0, 0, 0), s.two_proportion_z(0, 0, 5), s.one_sample_z(0, 0)):
        assert nothing is None


def test_holm():
    """Oracle: statsmodels' multipletests([.01, .04, .03, .005], method='holm')."""
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_and_keeps_their_order(ps):
    """A property."""
    adjusted = s.holm(ps)
    assert all(a >= p and a <= 1 for a, p in zip(adjusted, ps, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_power_of_the_paper():
    """Oracle: footnote 9's 0.17; statsmodels' NormalIndPower: 0.169932 for 900, 899.3 for 0.17."""
    assert s.smallest_effect(900) == pytest.approx(0.16993211651699067, abs=1e-6)
    assert s.votes_for_effect(0.17) == 900
    share = s.share_of_effect(0.17)
    h = 2 * math.asin(math.sqrt(share)) - 2 * math.asin(math.sqrt(1 - share))
    assert h == pytest.approx(0.17)  # Cohen's h


@pytest.mark.parametrize(("decided", "share"), [(5, 0.9), (6, 0.9), (50, 0.6), (327, 0.6)])
def test_power_of_the_sign_test(decided, share):
    """Oracle: the sum over all outcomes, with scipy's test and probabilities."""
    wins = np.arange(decided + 1)
    significant = [stats.binomtest(int(k), decided).pvalue <= 0.05 for k in wins]
    expected = stats.binom.pmf(wins, decided, share)[significant].sum()
    assert s.sign_test_power(decided, share) == pytest.approx(expected, abs=1e-9)


def test_items_for_a_share():
    """Oracle: the power of that number of items, and of all smaller ones by their list."""
    items = s.items_for_share(0.75)
    powers = [s.sign_test_power(n, 0.75) for n in range(1, items + 1)]
    assert powers[-1] >= 0.95 and max(powers[:-1]) < 0.95


def test_bootstrap_is_scipys():
    """Oracle: scipy.stats.bootstrap of the mean, with other random numbers."""
    generator = np.random.default_rng(5)
    gains = generator.integers(-3, 4, 200)
    firsts, seconds = np.maximum(-gains, 0), np.maximum(gains, 0)
    found = s.bootstrap(firsts, seconds, np.full(200, 3), seed=1)
    other = stats.bootstrap(
        (gains / 3,), np.mean, n_resamples=5000, method="percentile", rng=generator
    ).confidence_interval
    assert found["difference"] == pytest.approx(gains.mean() / 3)
    assert (found["low"], found["high"]) == pytest.approx((other.low, other.high), abs=0.01)
    assert found == s.bootstrap(firsts, seconds, np.full(200, 3), seed=1)
    assert s.bootstrap([], [], [], 0) is None


def test_majority_and_kappa():
    """Oracle: counted by hand; kappa of Cohen 1960: agreement 0.7, by chance 0.5."""
    assert s.majority("aab") == "a" and s.majority("ab") is None and s.majority("") is None
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert s.kappa(pairs) == pytest.approx(0.4)
    assert s.kappa([]) is None and s.kappa([("a", "a")]) is None


def test_alpha_levels():
    """Oracle: Krippendorff 2011's own example (section C): 0.743 nominal, 0.815 ordinal, 0.849."""
    units = [
        (1, 1, 1), (2, 2, 3, 2), (3, 3, 3, 3), (3, 3, 3, 3), (2, 2, 2, 2), (1, 2, 3, 4),
        (4, 4, 4, 4), (1, 1, 2, 1), (2, 2, 2, 2), (5, 5, 5), (1, 1), (3,),
    ]  # fmt: skip
    counts = [[unit.count(v) for v in range(1, 6)] for unit in units]
    levels = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}
    for level, expected in levels.items():
        assert agreement.alpha(counts, level, [1, 2, 3, 4, 5]) == pytest.approx(expected, abs=6e-4)


def test_precision_recall_f1_are_table_10s():
    """Oracle: the row "Head" of table 10. 97 yes (92 found), no "no", 1 of 1 unknown, 2 others.

    Its shares follow from these counts of 100 samples: 92 / 93, 92 / 97, 1 / 6, 1 / 1.
    """
    golds = ["yes"] * 97 + ["unknown"] + ["no"] * 2
    found = ["yes"] * 92 + ["unknown"] * 5 + ["unknown"] + ["yes"] + ["no"] * 0 + ["no"]
    made = s.classified(golds, found, ["yes", "no", "unknown"])
    yes, _, unknown = SODA["commonsense"]["Head"][:3]
    rows = made["labels"]
    assert [round(100 * rows["yes"][k], 1) for k in ("precision", "recall", "f1")] == yes
    assert [round(100 * rows["unknown"][k], 1) for k in ("precision", "recall", "f1")] == unknown
    weights = [97, 2, 1]
    for key in ("precision", "recall", "f1"):
        mean = np.average([rows[label][key] for label in rows], weights=weights)
        assert made["overall"][key] == pytest.approx(mean)
