"""Which rows are trained on, in which order, and which are held out. Pure functions of counts, hashes and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def draw_counts(num_rows: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many rows each file gives to the mix.

    Without weights all of them. With weights, each file's share of the mix is its share of the weights, and the mix
    is the largest in which no row is drawn twice: one file gives all its rows, the others as many as fit to them.
    """
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return list(num_rows)
    assert len(shares) == len(num_rows), "weights are for all files or for none"
    scale = min(rows / weight for rows, weight in zip(num_rows, shares, strict=True))
    return [min(rows, max(1, round(scale * weight))) for rows, weight in zip(num_rows, shares, strict=True)]


def choose(num_rows: int, count: int, rng: np.random.Generator) -> Indices:
    """`count` random rows of a file, in order."""
    return np.arange(num_rows) if count == num_rows else np.sort(rng.permutation(num_rows)[:count])


def hold_out(hashes: NDArray[np.uint64], fraction: float) -> tuple[Indices, Indices]:
    """Rows to train on and rows to hold out, as indices into `hashes`, both in order.

    Rows with equal hashes are equal: all of them go to one side, and the held-out side keeps the first alone. Rows
    are ranked by their hash (which is keyed with the seed), so that the same rows are held out wherever they stand.
    """
    unique, first = np.unique(hashes, return_index=True)
    count = max(1, round(fraction * len(unique))) if fraction > 0 else 0
    if not count:
        return np.arange(len(hashes)), np.zeros(0, np.int64)
    return np.flatnonzero(hashes > unique[count - 1]), np.sort(first[:count])
