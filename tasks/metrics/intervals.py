"""Intervals of shares."""

import math

NORMAL_95 = 1.959963984540054  # standard errors to each side of a 95% interval


def wilson(count: float, total: float) -> tuple[float, float] | None:
    """Return Wilson's (1927) 95% interval of a share; None of nothing."""
    if total <= 0:
        return None
    z, share = NORMAL_95, count / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Rounding must not leave the interval of shares.
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)
