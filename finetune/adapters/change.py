"""What an adapter adds to one weight: a product of factors, or a whole matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """scale * b @ a, with a (R, in) and b (out, R) in float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def is_zero(self) -> bool:
        """Whether the weight stays as it is."""
        return self.scale == 0.0 or any(not any(torch.aminmax(side)) for side in (self.b, self.a))

    def times(self, share: float) -> LowRank:
        """The change times a number."""
        return replace(self, scale=self.scale * share)

    def rows(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Some rows of the change in float32, written to `out` if given."""
        return torch.mm(self.b[rows] * self.scale, self.a, out=out)

    def add_to_(self, base: Tensor, rows: slice) -> Tensor:
        """Some rows of a weight in float32, to which those of the change are added."""
        return base.addmm_(self.b[rows], self.a, alpha=self.scale)

    def exact_rows(self, rows: slice) -> Tensor:
        """Some rows of the change in float64."""
        return torch.mm(self.b[rows].double(), self.a.double()).mul_(self.scale)

    def roundings(self, rows: slice) -> Tensor:
        """Sizes of all values that float32 rounds on the way to some rows, added up."""
        return torch.mm(self.b[rows].abs(), self.a.abs()).mul_((len(self.a) + 2) * abs(self.scale))


@dataclass(frozen=True)
class WholeDelta:
    """scale * delta, with delta (out, in) in float32."""

    delta: Tensor
    scale: float = 1.0

    @property
    def is_zero(self) -> bool:
        """Whether the weight stays as it is."""
        return not bool(self.delta.any()) or self.scale == 0.0

    def times(self, share: float) -> WholeDelta:
        """The change times a number."""
        return replace(self, scale=self.scale * share)

    def rows(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Some rows of the change in float32, written to `out` if given."""
        return torch.mul(self.delta[rows], self.scale, out=out)

    def add_to_(self, base: Tensor, rows: slice) -> Tensor:
        """Some rows of a weight in float32, to which those of the change are added."""
        return base.add_(self.delta[rows], alpha=self.scale)

    def exact_rows(self, rows: slice) -> Tensor:
        """Some rows of the change in float64."""
        return self.delta[rows].double().mul_(self.scale)

    def roundings(self, rows: slice) -> Tensor:
        """Sizes of all values that float32 rounds on the way to some rows, added up."""
        return self.delta[rows].abs().mul_(2 * abs(self.scale))


Change = LowRank | WholeDelta


def add_up(parts: list[Any]) -> Change | None:
    """Several changes of one weight as one; None for none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    if all(isinstance(part, LowRank) for part in parts):
        b_OR = torch.cat([part.b * part.scale for part in parts], dim=1)
        return LowRank(torch.cat([part.a for part in parts]), b_OR, 1.0)
    return WholeDelta(torch.stack([part.rows(slice(None)) for part in parts]).sum(0))
