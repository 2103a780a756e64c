"""How much of the adapter survives rounding to the storage dtype.

bf16 keeps 8 bits of a weight, so a delta of a hundredth of the weight is mostly rounded away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 0.9


@dataclass(frozen=True)
class Retention:
    """Realised against wanted change of one family of weights, over the rows that were measured of every tensor.

    ratio: <realised, wanted> / <wanted, wanted>, 1 when nothing is lost.  cosine: between the two.
    unchanged_share: elements that kept their value.
    """

    tensors: int
    ratio: float
    cosine: float
    unchanged_share: float

    @property
    def is_low(self) -> bool:
        """Whether ratio or cosine is under the threshold."""
        return min(self.ratio, self.cosine) < THRESHOLD


class Tally:
    """Sums for one family: float32 within a piece of a tensor, float64 over all pieces."""

    def __init__(self, tensors: int = 0) -> None:
        self.tensors = tensors
        self._elements = self._changed = 0
        self._realised_wanted = self._wanted_wanted = self._realised_realised = 0.0

    @classmethod
    def from_dict(cls, content: dict[str, float]) -> Tally:
        """What `to_dict` gave."""
        tally = cls()
        vars(tally).update(content)
        return tally

    def to_dict(self) -> dict[str, float]:
        """Everything, as plain JSON types."""
        return dict(vars(self))

    def add(self, realised: Tensor, wanted: Tensor) -> None:
        """Adds a piece of a tensor: what was written minus what was there, and the delta asked for (float32)."""
        realised, wanted = realised.reshape(-1), wanted.reshape(-1)
        self._elements += realised.numel()
        self._changed += int(torch.ne(realised, 0, out=torch.empty_like(realised)).sum())  # 3x count_nonzero's speed
        self._realised_wanted += torch.dot(realised, wanted).item()
        self._wanted_wanted += torch.dot(wanted, wanted).item()
        self._realised_realised += torch.dot(realised, realised).item()

    def merge(self, other: Tally) -> None:
        """Adds the sums of another tally."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def retention(self) -> Retention:
        """The numbers over everything added."""
        norms = (self._wanted_wanted * self._realised_realised) ** 0.5
        return Retention(
            tensors=self.tensors,
            ratio=self._realised_wanted / self._wanted_wanted if self._wanted_wanted else 1.0,
            cosine=self._realised_wanted / norms if norms else 0.0,
            unchanged_share=1 - self._changed / max(self._elements, 1),
        )


def advice(retention: dict[str, Retention]) -> tuple[str, ...]:
    """One warning naming the families that lost too much to rounding, and the remedy; empty when none did."""
    low = {family: kept for family, kept in retention.items() if kept.is_low}
    if not low:
        return ()
    losses = ", ".join(f"{family} keeps {kept.ratio:.0%} (cosine {kept.cosine:.2f})" for family, kept in low.items())
    return (
        f"rounding to the storage dtype loses much of the adapter: {losses}. Merge with --dtype fp32 (or fp16, which "
        "keeps 3 bits more than bf16), or serve the adapter unmerged",
    )
