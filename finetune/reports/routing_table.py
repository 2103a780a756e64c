"""Tables of routing: how concentrated it is, and what a plan would train."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from finetune.config.schema import SelectRule
from finetune.routing.explore import Exploration
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import Concentration, RoutingProfile, load_share
from finetune.routing.select import split_half_stability

STABLE = 0.8


def profile_facts(profile: RoutingProfile, stability: float | None) -> dict[str, Any]:
    """How concentrated the routing is, averaged over layers, and whether two halves of the sample agree."""
    found = Concentration.of(profile.token_counts_LE)
    return {
        "tokens": profile.num_tokens,
        "layers": profile.num_layers,
        "experts": profile.num_experts,
        "experts_per_token": profile.experts_per_token,
        "hottest_quarter_share": float(found.hottest_quarter.mean()),
        "entropy": float(found.entropy.mean()),
        "unused_experts": int(found.dead.sum()),
        "split_half_stability": stability,
    }


def plan_facts(plan: ExpertPlan, profile: RoutingProfile, trainable_parameters: int | None = None) -> dict[str, Any]:
    """How many experts train, and what share of the routing reaches them."""
    total = profile.num_layers * profile.num_experts
    facts: dict[str, Any] = {
        "trained_experts": plan.num_trained,
        "experts": total,
        "trained_share": plan.num_trained / total,
        "routing_share": sum(routing_share(plan, profile)) / profile.num_layers,
    }
    if trainable_parameters is not None:
        facts["trainable_parameters"] = trainable_parameters
    return facts


def routing_share(plan: ExpertPlan, profile: RoutingProfile) -> list[float]:
    """Share of each layer's token-expert pairs that go to experts of the plan."""
    share_LE = load_share(profile.token_counts_LE)
    chosen = [plan.experts_by_layer.get(layer, ()) for layer in profile.layer_indices]
    return [float(share[list(experts)].sum()) for share, experts in zip(share_LE, chosen, strict=True)]


def render_profile(profile: RoutingProfile, stability: float | None) -> Group:
    """The profile by layer, and what it means."""
    return Group(_concentration(profile), *_stability(profile, stability))


def _concentration(profile: RoutingProfile) -> Group:
    found = Concentration.of(profile.token_counts_LE)
    table = Table("layer", title=f"routing of {profile.num_tokens:,} tokens", title_justify="left")
    for column in ("hottest expert", "hottest 25 %", "entropy", "variation", "unused"):
        table.add_column(column, justify="right")
    hottest = load_share(profile.token_counts_LE)
    for row, layer in enumerate(profile.layer_indices):
        table.add_row(
            str(layer),
            f"{int(hottest[row].argmax())} ({hottest[row].max():.1%})",
            f"{found.hottest_quarter[row]:.1%}",
            f"{found.entropy[row]:.3f}",
            f"{found.variation[row]:.2f}",
            str(int(found.dead[row])),
        )
    line = f"a quarter of the experts takes {found.hottest_quarter.mean():.1%} of the routing (25 % if all were alike)"
    return Group(table, Text(line))


def exploration_to_dict(found: Exploration) -> dict[str, Any]:
    """What `finetune experts --json` prints."""
    rule = found.rule.model_dump(exclude_none=True)
    if found.rule.budget is None:
        del rule["budget_per"]
    return {
        "rule": rule,
        **found.plan.to_dict(),
        **plan_facts(found.plan, found.profile, found.trainable_parameters),
        "split_half_stability": found.stability,
    }


def render_explorations(found: list[Exploration]) -> Group:
    """One choice by layer, or several beside one another."""
    if len(found) == 1:
        (only,) = found
        return Group(
            render_plan(only.plan, only.profile, only.trainable_parameters), *_stability(only.profile, only.stability)
        )
    table = Table(title="what rules would choose", title_justify="left")
    table.add_column("rule", no_wrap=True)
    for column in ("experts", "share", "routing", "parameters", "halves agree"):
        table.add_column(column, justify="right")
    for each in found:
        facts = plan_facts(each.plan, each.profile, each.trainable_parameters)
        (rule,) = ((name, value) for name, value in each.rule.model_dump().items() if name != "budget_per" and value)
        table.add_row(
            f"{rule[0]} {rule[1]}",
            f"{facts['trained_experts']:,} of {facts['experts']:,}",
            f"{facts['trained_share']:.1%}",
            f"{facts['routing_share']:.1%}",
            f"{facts['trainable_parameters']:,}" if "trainable_parameters" in facts else "",
            "" if each.stability is None else f"{each.stability:.0%}",
        )
    return Group(_concentration(found[0].profile), table)


def render_plan(plan: ExpertPlan, profile: RoutingProfile, trainable_parameters: int | None = None) -> Group:
    """What would train in each layer."""
    table = Table("layer", title="experts that train", title_justify="left")
    table.add_column("trained", justify="right")
    table.add_column("routing", justify="right")
    table.add_column("ids")
    shares = routing_share(plan, profile)
    for layer, share in zip(profile.layer_indices, shares, strict=True):
        experts = plan.experts_by_layer.get(layer, ())
        table.add_row(str(layer), f"{len(experts)} of {plan.num_experts}", f"{share:.1%}", spans(experts))
    return Group(table, plan_line(plan, profile, trainable_parameters))


def render_choice(plan: ExpertPlan | None, profile: RoutingProfile | None, rule: SelectRule | None) -> Group:
    """What a training run says about the experts it chose; nothing when all train."""
    if plan is None:
        return Group()
    if profile is None:
        return Group(Text(f"{plan.num_trained:,} experts train, as the plan says"))
    return Group(plan_line(plan, profile), *_stability(profile, split_half_stability(profile, rule)))


def plan_line(plan: ExpertPlan, profile: RoutingProfile, trainable_parameters: int | None = None) -> Text:
    """`32 of 128 experts train (25.0 %); 61.2 % of the routing reaches them`."""
    facts = plan_facts(plan, profile)
    text = f"{facts['trained_experts']:,} of {facts['experts']:,} experts train ({facts['trained_share']:.1%})"
    text += f"; {facts['routing_share']:.1%} of the routing reaches them"
    if plan.ranks_by_layer is not None:
        counts = Counter(rank for ranks in plan.ranks_by_layer.values() for rank in ranks)
        text += "; " + ", ".join(f"{counts[rank]:,} at rank {rank}" for rank in sorted(counts, reverse=True))
    if trainable_parameters is not None:
        text += f"; {trainable_parameters:,} trainable parameters"
    return Text(text)


def spans(ids: tuple[int, ...]) -> str:
    """`0-3, 7, 9-10`."""
    parts: list[list[int]] = []
    for expert in ids:
        if parts and parts[-1][-1] == expert - 1:
            parts[-1].append(expert)
        else:
            parts.append([expert])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _stability(profile: RoutingProfile, stability: float | None) -> list[Text]:
    advice = "look at more rows (experts.profile_tokens) before you rely on the choice"
    if stability is None:
        few = f"warning: too few rows to see whether two halves of them agree; {advice}"
        return [] if profile.half_counts_LE is None else [Text(few, style="yellow")]
    line = Text(f"two halves of the sample agree on {stability:.0%} of the experts, choosing by tokens")
    if stability >= STABLE:
        return [line]
    return [line, Text(f"warning: that is little; {advice}", style="yellow")]
