"""Measure how far annotators agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def alpha(counts: Any, level: str, values: Sequence[float] | None = None) -> float | None:
    """Return Krippendorff's alpha of votes; `counts` [units, values] are numbers of annotators.

    `level` is nominal, ordinal (values in their order) or interval (`values` are the numbers). None
    where all votes are the same, for which alpha is undefined. Needs the extra `stats`.
    """
    import krippendorff

    counts = np.asarray(counts)
    # Units with one vote are left out, because alpha compares pairs of votes.
    if (counts[counts.sum(1) > 1].sum(0) > 0).sum() < 2:
        return None
    return float(
        krippendorff.alpha(
            value_counts=counts,
            level_of_measurement=level,
            value_domain=None if values is None else np.asarray(values, float),
        )
    )
