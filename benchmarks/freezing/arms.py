"""What the study compares: which parameters train in each arm, and at what learning rates it is tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.config.schema import SelectRule
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile
from finetune.routing.score import shares
from finetune.routing.select import apply_rule

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The grid of learning rates; an arm's search starts at its middle one and the two beside it."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    score: how experts are chosen; None for all of them, `coldest` for the opposite of tokens.
    fraction: of the experts of each layer.
    expert_rank, attention_rank: of the factors; 0 for none.
    weights: None for LoRA, `experts` for the chosen experts' own weights, `all` for every weight.
    like: the arm whose learning rate it takes, where as much trains in the same way and only the score is another.
    """

    name: str
    score: str | None = None
    fraction: float = 0.25
    expert_rank: int = 0
    attention_rank: int = 0
    weights: str | None = None
    like: str | None = None

    @property
    def middle_rate(self) -> float:
        """The learning rate that its search starts from, and the one of the short form."""
        if self.weights is not None:
            return 1e-3 if self.weights == "all" else 3e-3
        return 3e-3 if self.attention_rank else 1e-2

    def section(self) -> dict[str, Any]:
        """The adapter section of a recipe; alpha is twice the rank."""
        section: dict[str, Any] = {"attention": ATTENTION if self.attention_rank else ()}
        rank = self.attention_rank or self.expert_rank or 1
        section |= {"rank": rank, "alpha": 2.0 * rank}
        if self.weights == "experts":
            section |= {"experts": EXPERTS}
        elif self.expert_rank:
            section |= {"experts": EXPERTS, "expert_rank": self.expert_rank, "expert_alpha": 2.0 * self.expert_rank}
        return section

    def plan(self, profile: RoutingProfile, general: RoutingProfile, seed: int) -> ExpertPlan | None:
        """The experts that train; None for all."""
        if self.score is None:
            return None
        if self.score == "coldest":
            share = 1.0 - shares(profile)
        else:
            share = shares(profile, self.score, against=general if self.score == "contrast" else None, seed=seed)
        assert np.isfinite(share).all()
        return apply_rule(share, SelectRule(top_fraction=self.fraction), profile.layer_indices)


HOT, RANDOM, EQUAL = "hot 25 % (tokens)", "random 25 %", "all experts, equal parameters"
ALL, FULL, ESFT = "all experts", "full fine-tuning", "ESFT: hot 25 %, own weights"
ATTENTION_AND_HOT = "attention + hot 25 %"

ARMS = (
    Arm(HOT, "tokens", expert_rank=8),
    Arm(RANDOM, "random", expert_rank=8),
    Arm(EQUAL, expert_rank=2),
    Arm(ALL, expert_rank=8),
    Arm("coldest 25 %", "coldest", expert_rank=8),
    Arm("hot 25 % (gate)", "gate", expert_rank=8, like=HOT),
    Arm("hot 25 % (mass)", "mass", expert_rank=8, like=HOT),
    Arm("hot 25 % (gradient)", "gradient", expert_rank=8, like=HOT),
    Arm("hot 25 % (contrast)", "contrast", expert_rank=8, like=HOT),
    Arm("hot 12.5 %, double rank", "tokens", 0.125, expert_rank=16),
    Arm("attention", attention_rank=8),
    Arm(ATTENTION_AND_HOT, "tokens", expert_rank=8, attention_rank=8),
    Arm("attention + random 25 %", "random", expert_rank=8, attention_rank=8),
    Arm("attention + all experts", expert_rank=8, attention_rank=8),
    Arm(FULL, weights="all"),
    Arm(ESFT, "tokens", weights="experts"),
)
SHORT_ARMS = (HOT, RANDOM, EQUAL, ALL, "coldest 25 %", "hot 25 % (contrast)", ATTENTION_AND_HOT, ESFT)
MANY_SEEDS = (HOT, RANDOM, EQUAL)
"""Arms of the comparisons that matter."""
FEW_ARMS = (HOT, RANDOM, EQUAL, ALL, "hot 25 % (contrast)", "attention", ATTENTION_AND_HOT, FULL, ESFT)
"""Arms without replay, and on the second base."""
