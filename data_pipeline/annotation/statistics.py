"""The statistics of votes: intervals, tests and power, from counts alone.

The papers name no test. The SODA paper gives |z|, and table 7 fits a z test of two proportions
that takes the two shares for two samples. They are shares of one sample: without ties that z is
too large by the square root of 2. `one_sample_z` is right for independent votes. Votes on one item
are not independent, so the sign test counts items, and the bootstrap draws items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T", bound=Hashable)
_NORMAL = NormalDist()
RESAMPLES = 10_000


def p_of_z(z: float) -> float:
    """Return the two-sided p of a standard normal value."""
    # erfc keeps its digits far out, where 1 - cdf is 0.
    return math.erfc(abs(z) / math.sqrt(2))


def two_proportion_z(first: float, second: float, votes: int) -> float | None:
    """Return the pooled z of two shares, each as if of its own `votes`: the paper's form.

    None without votes, or where the shares leave no variance.
    """
    if not votes:
        return None
    pooled = (first + second) / (2 * votes)
    variance = 2 * pooled * (1 - pooled) / votes
    return (first - second) / votes / math.sqrt(variance) if variance > 0 else None


def one_sample_z(first: float, second: float) -> float | None:
    """Return the z of `first` against `second` wins of independent votes, ties left out.

    It is McNemar's: the difference over the square root of the sum. None without a win.
    """
    return (first - second) / math.sqrt(first + second) if first + second else None


def sign_test(first: int, second: int) -> float:
    """Return the exact two-sided p of `first` against `second` wins; 1 where there is none."""
    total, fewer = first + second, min(first, second)
    if first == second:
        return 1.0
    ways, term = 0, 1
    for k in range(fewer + 1):
        ways += term
        term = term * (total - k) // (k + 1)
    # Whole numbers of any length: no rounding before the last division.
    return min(1.0, 2 * ways / 2**total)


def halved(first: int, ties: int, second: int) -> tuple[int, int]:
    """Return the wins with each side given half of the ties; an odd one is left out."""
    return first + ties // 2, second + ties // 2


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method, in the order given."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def bootstrap(
    firsts: Sequence[float],
    seconds: Sequence[float],
    votes: Sequence[float],
    seed: int,
    level: float = 0.95,
) -> dict[str, float] | None:
    """Return the difference of shares, second - first, with its percentile interval over items.

    Element i of each sequence belongs to item i. None without votes.
    """
    if not sum(votes):
        return None
    generator, n = np.random.default_rng(seed), len(votes)
    # Items with equal votes are drawn together: a few kinds of items, whatever their number.
    kinds = Counter(zip(firsts, seconds, votes, strict=True))
    kinds = sorted((*kind, count) for kind, count in kinds.items())
    first, second, sizes, counts = np.array(kinds, float).T
    drawn = generator.multinomial(n, counts / n, RESAMPLES)
    differences = drawn @ (second - first) / np.maximum(drawn @ sizes, 1)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return {
        "difference": (sum(seconds) - sum(firsts)) / sum(votes),
        "low": float(low),
        "high": float(high),
        "resamples": RESAMPLES,
        "seed": seed,
    }


def majority(votes: Iterable[T]) -> T | None:
    """Return the most frequent vote; None for no votes, and where two are equally frequent."""
    counts = Counter(votes).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Return Cohen's kappa of pairs of votes; None where chance alone would agree always."""
    if not pairs:
        return None
    lefts, rights = (Counter(side) for side in zip(*pairs, strict=True))
    chance = sum(lefts[value] * rights[value] for value in lefts) / len(pairs) ** 2
    agree = sum(one == two for one, two in pairs) / len(pairs)
    return (agree - chance) / (1 - chance) if chance < 1 else None


def smallest_effect(votes: int, power: float = 0.95, level: float = 0.05) -> float:
    """Return the smallest standardised effect that two samples of `votes` each detect.

    The paper's 0.17 (footnote 9) is that of 900 votes: 300 items, 3 judges.
    """
    return _sum_of_quantiles(power, level) * math.sqrt(2 / votes)


def votes_for_effect(effect: float, power: float = 0.95, level: float = 0.05) -> int:
    """Return the votes that `smallest_effect` needs for an effect."""
    return math.ceil(2 * (_sum_of_quantiles(power, level) / effect) ** 2)


def share_of_effect(effect: float) -> float:
    """Return the larger of two shares that sum to 1 and differ by Cohen's h = `effect`."""
    return math.sin(math.pi / 4 + effect / 4) ** 2


def _sum_of_quantiles(power: float, level: float) -> float:
    return _NORMAL.inv_cdf(1 - level / 2) + _NORMAL.inv_cdf(power)


def sign_test_power(decided: int, share: float, level: float = 0.05) -> float:
    """Return the exact power of the two-sided sign test on `decided` items, `share` won by one."""
    counts = np.arange(decided + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, decided + 1)))])
    ways = logs[-1] - logs - logs[::-1]
    tail = np.cumsum(np.exp(ways - decided * math.log(2)))
    critical = int((2 * tail <= level).sum())  # numbers of wins, from 0, that are significant
    if not critical:
        return 0.0
    chances = np.exp(ways + counts * math.log(share) + (decided - counts) * math.log(1 - share))
    return float(chances[:critical].sum() + chances[decided + 1 - critical :].sum())


def items_for_share(share: float, power: float = 0.95, level: float = 0.05) -> int:
    """Return the least number of decided items at which the sign test has the power asked for."""
    quantiles = _NORMAL.inv_cdf(1 - level / 2) / 2, _NORMAL.inv_cdf(power)
    rough = (quantiles[0] + quantiles[1] * math.sqrt(share * (1 - share))) / (share - 0.5)
    # Exact power rises and falls with each item; the search begins below the normal approximation.
    decided = max(1, int(0.9 * rough**2) - 10)
    while sign_test_power(decided, share, level) < power:
        decided += 1
    return decided


def classified(golds: Sequence[str], found: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Return precision, recall and F1 of each label, and their means weighted by gold counts.

    As in table 10 of Kim et al. 2023: what is undefined counts as 0.
    """
    from cosmo.tasks.metrics import safety

    rows = safety.per_class(safety.confusion(golds, found, labels))
    names = ("precision", "recall", "f1")
    rows = [{**row, **{name: row[name] or 0.0 for name in names}} for row in rows]
    total = sum(row["gold"] for row in rows)
    overall = {
        name: sum(row[name] * row["gold"] for row in rows) / total if total else None
        for name in names
    }
    return {"labels": dict(zip(labels, rows, strict=True)), "overall": overall, "items": total}
