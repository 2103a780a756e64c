"""Metrics over rows, with their uncertainty: of one model, and of two on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.inference.intervals import Interval, bootstrap, paired_shares, wilson

Groups = dict[str, list[int]]
"""Name of a group of rows -> their indices."""


@dataclass(frozen=True)
class Column:
    """One metric of every row.

    kind: a `share` has values 0 and 1.
    values: None where the metric says nothing of a row.
    weights: what the sum of the values is divided by; every row's 1 when None.
    """

    name: str
    kind: Literal["share", "mean"]
    values: list[float | None]
    weights: list[float] | None = None

    def at(self, rows: Sequence[int]) -> tuple[list[float], list[float]]:
        """Values and weights of some rows that have values."""
        weights = [1.0] * len(self.values) if self.weights is None else self.weights
        return [value for row in rows if (value := self.values[row]) is not None], [weights[row] for row in rows]


@dataclass(frozen=True)
class Measured:
    """A metric over a group of rows.

    rows: of which the metric says something.  value: share of those, or their mean.
    low, high: its 95 % interval.  interval: how it was made, `wilson` or `bootstrap`.
    """

    group: str
    metric: str
    rows: int
    value: float
    low: float
    high: float
    interval: Literal["wilson", "bootstrap"]


@dataclass(frozen=True)
class Compared:
    """A metric of two models over the rows of which it says something for both.

    difference: value - against.  low, high: its 95 % interval over pairs.  interval: how it was made, `bonett-price` or
    `bootstrap`.
    """

    group: str
    metric: str
    rows: int
    value: float
    against: float
    difference: float
    low: float
    high: float
    interval: Literal["bonett-price", "bootstrap"]


def measure(columns: Sequence[Column], groups: Groups) -> Iterator[Measured]:
    """Every metric in every group that it says something of."""
    for group, members in groups.items():
        for column in columns:
            rows = [row for row in members if column.values[row] is not None]
            if not rows:
                continue
            values, weights = column.at(rows)
            share = column.kind == "share"
            low, high = wilson(round(sum(values)), len(rows)) if share else bootstrap(values, weights)
            how: Literal["wilson", "bootstrap"] = "wilson" if share else "bootstrap"
            yield Measured(group, column.name, len(rows), sum(values) / sum(weights), low, high, how)


def compare(columns: Sequence[Column], others: Sequence[Column], groups: Groups) -> Iterator[Compared]:
    """The same metrics of two models, pair by pair; not the loss where tokenizers make other tokens of the rows."""
    for group, members in groups.items():
        for one, other in zip(columns, others, strict=True):
            rows = [row for row in members if one.values[row] is not None and other.values[row] is not None]
            if not rows or one.weights != other.weights:
                continue
            (mine, weights), (theirs, _) = one.at(rows), other.at(rows)
            total = sum(weights)
            low, high = _paired(one, mine, theirs, weights)
            how: Literal["bonett-price", "bootstrap"] = "bonett-price" if one.kind == "share" else "bootstrap"
            value, against = sum(mine) / total, sum(theirs) / total
            yield Compared(group, one.name, len(rows), value, against, value - against, low, high, how)


def _paired(column: Column, mine: list[float], theirs: list[float], weights: list[float]) -> Interval:
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    if column.kind == "share":
        gained, lost = (sum(difference == sign for difference in differences) for sign in (1, -1))
        return paired_shares(gained, lost, len(differences))
    return bootstrap(differences, weights)
