"""From shares to a plan: a pure function, the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.load import parse_section
from finetune.config.schema import ExpertsSection, SelectRule
from finetune.config.values import parameters_in
from finetune.errors import Problem, RoutingError
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile, Sums
from finetune.routing.score import shares

ROUNDING = 1e-9
"""Shares this close to a threshold have reached it."""


def select(
    profile: RoutingProfile,
    experts: ExpertsSection | dict[str, Any],
    *,
    against: RoutingProfile | None = None,
    seed: int = 0,
    expert_parameters: int | None = None,
    rank: int | None = None,
) -> ExpertPlan:
    """The plan that a recipe's `experts` section, or a dict with its fields, makes of a profile.

    expert_parameters: trainable parameters that one expert of one layer costs; a budget needs it.
    rank: of the experts outside of `experts.hot`, which needs it.
    Raises RoutingError when the profile lacks what the score needs, or the budget is too small for any plan.
    """
    experts = parse_section(ExpertsSection, experts, RoutingError)
    rule = experts.select
    if rule is None:
        return ExpertPlan.all(profile.layer_indices, profile.num_experts)
    share_LE = shares(profile, experts.score, against=against, seed=seed)
    plan = apply_rule(share_LE, rule, profile.layer_indices, expert_parameters)
    if experts.hot is None:
        return plan
    if rank is None:
        raise RoutingError(Problem("experts.hot", "needs the rank of the other experts", "give rank=16, or as it is"))
    return _with_ranks(plan, apply_rule(share_LE, experts.hot.rule, profile.layer_indices), experts.hot.rank, rank)


def _with_ranks(plan: ExpertPlan, hot: ExpertPlan, hot_rank: int, rank: int) -> ExpertPlan:
    """`plan` with `hot_rank` for those of its experts that are in `hot` as well, and `rank` for the others."""
    ranks = {
        layer: tuple(hot_rank if expert in hot.experts_by_layer[layer] else rank for expert in experts)
        for layer, experts in plan.experts_by_layer.items()
    }
    return ExpertPlan(plan.experts_by_layer, plan.num_experts, ranks)


def apply_rule(
    share_LE: Sums, rule: SelectRule, layer_indices: tuple[int, ...], expert_parameters: int | None = None
) -> ExpertPlan:
    """The experts with the largest shares, as many as `rule` says: at least one per layer, ties to the lower id."""
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    if rule.top_fraction is not None:
        counts = np.full(len(share_LE), rule.count_of(share_LE.shape[1]))
    elif rule.top_p is not None:
        carried_LE = np.cumsum(np.take_along_axis(share_LE, order_LE, axis=1), axis=1)
        counts = (carried_LE < rule.top_p - ROUNDING).sum(axis=1) + 1
    else:
        assert rule.budget is not None, "a plan file needs no rule"
        counts = _afford(share_LE, order_LE, rule, expert_parameters)
    counts = np.clip(counts, 1, share_LE.shape[1])
    chosen = {
        layer: tuple(sorted(order[:count].tolist()))
        for layer, order, count in zip(layer_indices, order_LE, counts, strict=True)
    }
    return ExpertPlan(chosen, share_LE.shape[1])


def _afford(
    share_LE: Sums, order_LE: NDArray[np.int64], rule: SelectRule, expert_parameters: int | None
) -> NDArray[np.int64]:
    """How many experts of each layer the budget pays for."""
    if expert_parameters is None:
        hint = "give expert_parameters, or a model: `finetune experts ROUTING --budget 5M --model FOLDER --rank 16`"
        raise RoutingError(Problem("budget", "needs to know how many parameters an expert costs", hint))
    assert rule.budget is not None
    num_layers, num_experts = share_LE.shape
    total = parameters_in(rule.budget) // expert_parameters
    if total < num_layers:
        least = num_layers * expert_parameters
        hint = f"give at least {least:,}: one expert in each of {num_layers} layers; or lower the rank"
        raise RoutingError(Problem("budget", "does not pay for one expert in each layer", hint, rule.budget))
    if rule.budget_per == "layer":
        return np.full(num_layers, total // num_layers)
    # every layer's best expert is in; the rest compete by share, ties to the lower layer, then the lower id
    rest = np.take_along_axis(share_LE, order_LE, axis=1)[:, 1:]
    winners = np.argsort(-rest, axis=None, kind="stable")[: total - num_layers]
    return 1 + np.bincount(winners // max(num_experts - 1, 1), minlength=num_layers)


def reselect(plan: ExpertPlan, share_LE: Sums, layer_indices: tuple[int, ...], margin: float) -> ExpertPlan:
    """`plan` with frozen experts in the place of trained ones whose share theirs exceeds by the factor 1 + margin.

    In each layer the hottest frozen expert replaces the coldest trained one, as long as that holds; ties go to the
    lower id. As many experts train as before.
    """
    chosen = {}
    for layer, experts in plan.experts_by_layer.items():
        share_E = share_LE[layer_indices.index(layer)]
        trained = sorted(experts, key=lambda expert: (share_E[expert], -expert))
        frozen = sorted(set(range(plan.num_experts)) - set(experts), key=lambda expert: (-share_E[expert], expert))
        swaps = sum(share_E[new] > (1 + margin) * share_E[old] for old, new in zip(trained, frozen, strict=False))
        chosen[layer] = (*trained[swaps:], *frozen[:swaps])
    return ExpertPlan(chosen, plan.num_experts)


def agreement(one: ExpertPlan, other: ExpertPlan) -> float:
    """How alike two plans are: 2 |both| / (|one| + |other|), averaged over layers. 1 when they are the same."""
    layers = one.experts_by_layer.keys() | other.experts_by_layer.keys()
    values = []
    for layer in layers:
        a, b = set(one.experts_by_layer.get(layer, ())), set(other.experts_by_layer.get(layer, ()))
        values.append(2 * len(a & b) / (len(a) + len(b)))
    return sum(values) / len(values)


def split_half_stability(profile: RoutingProfile, rule: SelectRule | None = None) -> float | None:
    """Agreement of the plans that two halves of the sample give by token share; None when the halves are not known.

    Without a rule, and with a budget, the hottest quarter of the experts is compared.
    """
    halves = profile.halves()
    if halves is None:
        return None
    if rule is None or rule.budget is not None or rule.file is not None:
        rule = SelectRule(top_fraction=0.25)
    plans = [
        apply_rule(
            shares(RoutingProfile(counts, profile.experts_per_token, profile.layer_indices)),
            rule,
            profile.layer_indices,
        )
        for counts in halves
    ]
    return agreement(*plans)
