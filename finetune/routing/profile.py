"""How much each expert of each layer is used by some rows. Arrays are (L, E): layers with experts x experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Sums = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """What the router of the frozen model does with a sample of rows.

    token_counts_LE: tokens sent to each expert.
    experts_per_token: experts a token is sent to in each layer.
    layer_indices: the decoder layer of each row of the arrays; 0, 1, ... when not given.
    gate_mass_LE: sum of routing weights.
    output_mass_LE: sum of routing weight x Euclidean norm of the expert's output.
    gradient_LE: sum of |routing weight x gradient of the loss by it|. That product is, token by token, the gradient
        times the weights of the expert's down projection: how much the loss would change, to first order, were the
        expert's answer scaled.
    half_counts_LE: token_counts of every second row of the sample, to see whether two halves agree.
    source: what the numbers came from. Of it only the model's fingerprint and widths are ever read.

    What is None was not measured.
    """

    token_counts_LE: Counts
    experts_per_token: int
    layer_indices: tuple[int, ...] = ()
    gate_mass_LE: Sums | None = None
    output_mass_LE: Sums | None = None
    gradient_LE: Sums | None = None
    half_counts_LE: Counts | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layer_indices:
            object.__setattr__(self, "layer_indices", tuple(range(len(self.token_counts_LE))))

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.token_counts_LE.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.token_counts_LE.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens counted."""
        return int(self.token_counts_LE[0].sum()) // self.experts_per_token

    def halves(self) -> tuple[Counts, Counts] | None:
        """Token counts of the two halves of the sample; None when they are not known, or one is empty."""
        if self.half_counts_LE is None:
            return None
        first, second = self.half_counts_LE, self.token_counts_LE - self.half_counts_LE
        return (first, second) if first.any() and second.any() else None


@dataclass(frozen=True)
class Concentration:
    """How unevenly tokens are spread over the experts of each layer, (L,) each.

    hottest_quarter: share of the routing that the busiest quarter of the experts takes; 0.25 when all are alike.
    entropy: of the load, 1 when all experts are alike, 0 when one takes everything.
    variation: standard deviation of the load over its mean.
    dead: experts without a token.
    """

    hottest_quarter: Sums
    entropy: Sums
    variation: Sums
    dead: Counts

    @classmethod
    def of(cls, token_counts_LE: Counts) -> Concentration:
        """Of token counts; a layer without any counts as even."""
        num_experts = token_counts_LE.shape[1]
        share = load_share(token_counts_LE)
        quarter = np.sort(share, axis=1)[:, ::-1][:, : max(1, round(num_experts / 4))].sum(axis=1)
        logs = np.log(share, where=share > 0, out=np.zeros_like(share))
        entropy = -(share * logs).sum(axis=1) / np.log(max(num_experts, 2))
        return cls(quarter, entropy, share.std(axis=1) * num_experts, (token_counts_LE == 0).sum(axis=1))


def load_share(token_counts_LE: Counts) -> Sums:
    """Counts as shares that sum to 1 within a layer."""
    total = token_counts_LE.sum(axis=1, keepdims=True)
    even = np.full(token_counts_LE.shape, 1 / token_counts_LE.shape[1])
    return np.divide(token_counts_LE, total, where=total > 0, out=even)
