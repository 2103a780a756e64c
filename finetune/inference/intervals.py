"""95 % intervals of shares and means, alone and of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

Interval = tuple[float, float]
Z = 1.959963984540054
"""Of the normal distribution, 97.5 % lie below."""
RESAMPLES = 2_000
SEED = 0


def wilson(hits: int, rows: int) -> Interval:
    """Of a share (E. B. Wilson, 1927): inside 0 and 1, and wider than nothing also where all or none are hits."""
    share, z2 = hits / rows, Z * Z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z * sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows)) / (1 + z2 / rows)
    return max(0.0, middle - half) if hits else 0.0, min(1.0, middle + half) if hits < rows else 1.0


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """Of a mean of rows, or of sum(values) / sum(weights): percentiles of 2,000 resamples with a fixed seed."""
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.default_rng(SEED)
    ratios = np.empty(RESAMPLES)
    for each in range(RESAMPLES):
        drawn_N = random.integers(0, len(values_N), len(values_N))
        ratios[each] = values_N[drawn_N].sum() / weights_N[drawn_N].sum()
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def paired_shares(gained: int, lost: int, rows: int) -> Interval:
    """Of the difference of two shares on the same rows (D. G. Bonett and R. M. Price, 2012).

    gained, lost: rows that only the first, or only the second, has right.
    """
    p, q = (gained + 1) / (rows + 2), (lost + 1) / (rows + 2)
    half = Z * sqrt((p + q - (p - q) ** 2) / (rows + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)
