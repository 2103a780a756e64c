"""How fast training was where it was measured, and what that says of another run. Nothing here is guessed.

The rates lie in rates.json beside this file, each with its origin. A run on a card that has none gets no hours.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

CPU = "cpu"


@dataclass(frozen=True)
class Rate:
    """A measured training step; card is `cpu` for a processor. row_tokens: that attend to one another."""

    card: str
    model: str
    scheme: str
    micro_batch_tokens: int
    row_tokens: int
    checkpointing: str
    flop_per_token: float
    tokens_per_second: float
    peak_gib: float
    origin: str

    @property
    def flop_per_second(self) -> float:
        """The arithmetic that was done."""
        return self.flop_per_token * self.tokens_per_second


@cache
def measured_rates() -> tuple[Rate, ...]:
    """All of them."""
    content = json.loads(files("finetune.planning").joinpath("rates.json").read_text(encoding="utf-8"))
    return tuple(Rate(flop_per_token=1e9 * row.pop("gflop_per_token"), **row) for row in map(dict, content["rates"]))


def nearest_rate(card: str | None, scheme: str, micro_batch_tokens: int) -> Rate | None:
    """The rate on `card` that is most like a run: the same storage, then the nearest micro-batch; None without any."""
    rates = [rate for rate in measured_rates() if rate.card == card]

    def distance(rate: Rate) -> tuple[bool, float, int]:
        apart = abs(math.log2(rate.micro_batch_tokens / micro_batch_tokens))
        return rate.scheme != scheme, apart, rate.row_tokens

    return min(rates, key=distance, default=None)
