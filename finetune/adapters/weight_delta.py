"""What an adapter adds to one weight: a product of low-rank factors, or a dense matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankDelta:
    """scale * b @ a, with a (R, in) and b (out, R) in float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def is_zero(self) -> bool:
        """Whether the weight stays as it is."""
        return self.scale == 0.0 or any(not any(torch.aminmax(side)) for side in (self.b, self.a))

    def times(self, share: float) -> LowRankDelta:
        """The delta times a number."""
        return replace(self, scale=self.scale * share)

    def rows(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Some rows of the delta in float32, written to `out` if given."""
        return torch.mm(self.b[rows] * self.scale, self.a, out=out)

    def add_to_(self, base: Tensor, rows: slice) -> Tensor:
        """Some rows of a weight in float32, to which those of the delta are added."""
        return base.addmm_(self.b[rows], self.a, alpha=self.scale)

    def exact_rows(self, rows: slice) -> Tensor:
        """Some rows of the delta in float64."""
        return torch.mm(self.b[rows].double(), self.a.double()).mul_(self.scale)

    def roundings(self, rows: slice) -> Tensor:
        """Sizes of all values that float32 rounds on the way to some rows, added up."""
        return torch.mm(self.b[rows].abs(), self.a.abs()).mul_((len(self.a) + 2) * abs(self.scale))


@dataclass(frozen=True)
class DenseDelta:
    """scale * delta, with delta (out, in) in float32."""

    delta: Tensor
    scale: float = 1.0

    @property
    def is_zero(self) -> bool:
        """Whether the weight stays as it is."""
        return not bool(self.delta.any()) or self.scale == 0.0

    def times(self, share: float) -> DenseDelta:
        """The delta times a number."""
        return replace(self, scale=self.scale * share)

    def rows(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Some rows of the delta in float32, written to `out` if given."""
        return torch.mul(self.delta[rows], self.scale, out=out)

    def add_to_(self, base: Tensor, rows: slice) -> Tensor:
        """Some rows of a weight in float32, to which those of the delta are added."""
        return base.add_(self.delta[rows], alpha=self.scale)

    def exact_rows(self, rows: slice) -> Tensor:
        """Some rows of the delta in float64."""
        return self.delta[rows].double().mul_(self.scale)

    def roundings(self, rows: slice) -> Tensor:
        """Sizes of all values that float32 rounds on the way to some rows, added up."""
        return self.delta[rows].abs().mul_(2 * abs(self.scale))


WeightDelta = LowRankDelta | DenseDelta


def sum_deltas(deltas: list[Any]) -> WeightDelta | None:
    """Several deltas of one weight as one; None for none."""
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    if all(isinstance(delta, LowRankDelta) for delta in deltas):
        b_OR = torch.cat([delta.b * delta.scale for delta in deltas], dim=1)
        return LowRankDelta(torch.cat([delta.a for delta in deltas]), b_OR, 1.0)
    return DenseDelta(torch.stack([delta.rows(slice(None)) for delta in deltas]).sum(0))
