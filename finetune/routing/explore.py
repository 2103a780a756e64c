"""What a rule would choose from a routing.json: no model, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.architecture.names import EXPERT_PROJECTIONS
from finetune.architecture.shape import read_model_shape
from finetune.config.load import parse_section
from finetune.config.schema import AdapterSection, ExpertsSection, SelectRule
from finetune.errors import Problem, RoutingError
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile
from finetune.routing.profile_file import read_profile
from finetune.routing.select import select, split_half_stability

RULES = (
    SelectRule(top_fraction=0.125),
    SelectRule(top_fraction=0.25),
    SelectRule(top_fraction=0.5),
    SelectRule(top_p=0.2),
    SelectRule(top_p=0.5),
)
"""What is shown when no rule is asked for."""


@dataclass(frozen=True)
class Exploration:
    """What one rule chooses.

    trainable_parameters: of the chosen experts' factors; None when the model's widths are not known.
    stability: see `split_half_stability`.
    """

    rule: SelectRule
    profile: RoutingProfile
    plan: ExpertPlan
    trainable_parameters: int | None
    stability: float | None


def explore(
    routing: str | Path, experts: dict[str, Any], *, seed: int = 0, rank: int = 16, model: str | Path | None = None
) -> list[Exploration]:
    """What `experts`, fields of a recipe's section, choose from a routing.json; what RULES choose without a rule.

    rank: of the factors on both projections. model: folder whose config.json has the widths, when the file has not.
    Raises RoutingError, or ModelError for `model`, with everything that is wrong.
    """
    section = parse_section(ExpertsSection, experts, RoutingError)
    if section.against is not None and section.score != "contrast":
        hint = "score by contrast, or leave it out"
        raise RoutingError(Problem("experts.against", f"is not read by score {section.score}", hint, section.against))
    if section.hot is not None and section.select is not None and section.select.budget is not None:
        hint = "choose by top_fraction or top_p"
        raise RoutingError(Problem("experts.hot", "does not go with a budget, which counts one rank", hint))
    profile = read_profile(routing)
    against = None if section.against is None else read_profile(section.against)
    price = _price(profile, rank, model)
    found = []
    for rule in RULES if section.select is None else (section.select,):
        asked = section.model_copy(update={"select": rule})
        plan = select(profile, asked, against=against, seed=seed, expert_parameters=price, rank=rank)
        paid = None if price is None else price * plan.sum_of_ranks(rank) // rank
        found.append(Exploration(rule, profile, plan, paid, split_half_stability(profile, rule)))
    return found


def _price(profile: RoutingProfile, rank: int, model: str | Path | None) -> int | None:
    adapter = AdapterSection(experts=EXPERT_PROJECTIONS, rank=rank)
    if model is not None:
        shape = read_model_shape(model)
        return adapter.expert_parameters(shape.hidden, shape.expert_intermediate)
    widths = [profile.source.get(name) for name in ("hidden_size", "expert_intermediate_size")]
    known = [width for width in widths if type(width) is int and width > 0]
    return adapter.expert_parameters(*known) if len(known) == 2 else None
