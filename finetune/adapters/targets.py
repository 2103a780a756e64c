"""From what a recipe asks for to the PEFT configuration that does it on one model."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn

from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.expert_lora import bank_problems
from finetune.architecture.family import model_type
from finetune.architecture.names import (
    ALL,
    ATTENTION,
    ATTENTION_PROJECTIONS,
    EXPERT_PROJECTIONS,
    EXPERTS,
    LINEAR_ATTENTION,
    LINEAR_ATTENTION_PROJECTIONS,
    MLP,
    MLP_PROJECTIONS,
    ROUTER,
    SHARED_EXPERT,
    layer_index,
)
from finetune.architecture.registry import FAMILIES, find_family, is_moe
from finetune.config.load import parse_section
from finetune.config.schema import AdapterSection
from finetune.errors import AdapterError, ModelError, Problem
from finetune.models.checkpoint import Checkpoint, base_fingerprint, find_checkpoint
from finetune.models.live import expert_modules, num_experts, projection_names, router_layers
from finetune.routing.plan import ExpertPlan

ExpertMode = Literal["lora", "full"]
Router = Literal["frozen", "lora", "full"]


def parse_adapter(adapter: Any) -> AdapterSection:
    """The adapter section of a recipe, also from a dict with its fields. Raises AdapterError with every problem."""
    if isinstance(adapter, AdapterSection):
        return adapter
    if not isinstance(adapter, dict):
        hint = f'give a dict like {{"attention": ["{ATTENTION_PROJECTIONS[0]}"], "rank": 8}}, or recipe.adapter'
        raise AdapterError(Problem("adapter", "must be a dict or an AdapterSection", hint, type(adapter).__name__))
    return parse_section(AdapterSection, adapter, AdapterError)


def lora_config(
    model: Any,
    section: AdapterSection,
    experts: ExpertPlan | None,
    expert_mode: ExpertMode = "lora",
    router: Router = "frozen",
) -> ExpertLoraConfig:
    """The configuration that attaches `section` to `model`. Raises AdapterError with every target that has no place."""
    problems = list(_misfits(model, section, experts))
    if expert_mode == "full" and experts is None:
        hint = "choose experts with a plan; ExpertPlan.all names every one"
        problems.append(Problem("experts", "train whole, but there is no plan", hint))
    if expert_mode == "full" and experts is not None and experts.ranks_by_layer is not None:
        what = "gives experts ranks, but whole experts have no factors"
        problems.append(Problem("expert plan", what, "remove ranks_by_layer, or train factors"))
    if router != "frozen" and not problems and not router_layers(model):
        hint = "a dense model has no experts to route to: leave router at frozen"
        problems.append(Problem("router.train", "matches nothing in this model", hint, router))
    if problems:
        raise AdapterError(*problems)
    bank_targets = _bank_targets(model, experts) if section.experts else []
    mlp = [f"{MLP}.{target}" if is_moe(model.config) else target for target in section.mlp]
    mlp += [f"{SHARED_EXPERT}.{target}" for target in _shared_targets(model, section)]
    attention = [*section.attention, *_linear_targets(model, section)]
    main = section.experts != ()
    rank, alpha = (section.rank_of_experts, section.alpha_of_experts) if main else (section.rank, section.alpha)
    if main and experts is not None and experts.max_rank is not None:  # every expert keeps the scale of the section
        ratio = experts.max_rank / rank
        rank, alpha = experts.max_rank, alpha * (ratio**0.5 if section.rslora else ratio)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    routers = [ROUTER] if router != "frozen" else []
    if main and (rank, alpha) != (section.rank, section.alpha):
        # on disk a dense MLP's target is its weight, live it is the module: the pattern matches both
        names = [*attention, *(rf"{target}(\.weight)?" for target in (*mlp, *routers))]
        ranks, alphas = dict.fromkeys(names, section.rank), dict.fromkeys(names, _whole(section.alpha))
    if router == "full":
        ranks[_ROUTER_WEIGHT] = num = num_experts(model)
        alphas[_ROUTER_WEIGHT] = num**0.5 if section.rslora else num  # a scale of 1
    return ExpertLoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=[*attention, *mlp, *bank_targets, *routers],
        exclude_modules=_towers(model),
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        task_type="CAUSAL_LM",
        expert_targets=section.experts,
        expert_plan=experts,
        expert_dropout=section.dropout_of_experts if section.experts else 0.0,
        expert_mode=expert_mode,
        router="lora" if router == "frozen" else router,
        section=section.model_dump(mode="json"),
        base_fingerprint=getattr(model, "base_fingerprint", None) or _fingerprint(model),
        revision=getattr(model, "base_revision", None),
        quantize=getattr(model, "packed_as", None),
        packed_in=getattr(model, "packed_in", None),
        rope_scaling=getattr(model, "rope_scaled", None),
    )


def _towers(model: Any) -> str | None:
    """What stock PEFT has to leave alone: modules of other towers have the names of the text model's."""
    family = find_family(model.config)
    towers = () if family is None or family.around is None else family.around.towers
    return rf"({'|'.join(map(re.escape, towers))})\..*" if towers else None


_ROUTER_WEIGHT = rf"{ROUTER}(\.weight)?"


def _linear_targets(model: nn.Module, section: AdapterSection) -> tuple[str, ...]:
    return section.linear_attention_of(
        name for name in LINEAR_ATTENTION_PROJECTIONS if projection_names(model, [name], [LINEAR_ATTENTION])
    )


def _shared_targets(model: nn.Module, section: AdapterSection) -> tuple[str, ...]:
    return section.shared_expert_of(exists=bool(projection_names(model, MLP_PROJECTIONS, [SHARED_EXPERT])))


def _bank_targets(model: nn.Module, experts: ExpertPlan | None) -> list[str]:
    """The short name that means every bank, or the full names of the banks in the plan."""
    names = list(expert_modules(model))
    chosen = [name for name in names if experts is None or layer_index(name) in experts.experts_by_layer]
    return [EXPERTS.rpartition(".")[2]] if chosen == names else chosen


def _misfits(model: Any, section: AdapterSection, experts: ExpertPlan | None) -> Any:
    if not isinstance(model, nn.Module) or find_family(getattr(model, "config", None)) is None:
        hint = f"give a causal language model of transformers of the type {' or '.join(FAMILIES)}"
        found = model_type(getattr(model, "config", None)) or type(model).__name__
        yield Problem("model", "is not of a supported family", hint, found)
        return
    if hasattr(model, "peft_config"):
        yield Problem("model", "has adapters already", "give the model they are attached to, or use load_adapter")
        return
    banks = expert_modules(model)
    named = (
        ("attention", section.attention, ATTENTION),
        ("linear_attention", section.linear_attention or (), LINEAR_ATTENTION),
        ("shared_expert", section.shared_expert or (), SHARED_EXPERT),
        ("mlp", section.mlp, MLP),
    )
    for part, targets, parent in named:
        for target in targets:
            meant = LINEAR_ATTENTION_PROJECTIONS if target == ALL else [target]
            if not projection_names(model, meant, [parent]):
                dense = "has no dense MLP: name its experts' projections in adapter.experts instead"
                hint = f"this model {dense}" if part == "mlp" and banks else "look at print(model) for its modules"
                yield Problem(f"adapter.{part}", "matches nothing in this model", hint, target)
    if section.experts and not banks:
        hint = "this model is dense: name projections in adapter.mlp instead"
        yield Problem("adapter.experts", "matches nothing in this model", hint, section.experts)
    elif experts is not None and not section.experts:
        yield Problem(
            "experts",
            "a plan is given but adapter.experts is empty",
            f"name {' or '.join(EXPERT_PROJECTIONS)}, or both",
        )
    elif section.experts:
        for name, bank in banks.items():
            yield from bank_problems(bank, name)
        if experts is not None:
            yield from _plan_misfits(banks, experts)


def _plan_misfits(banks: dict[str, Any], experts: ExpertPlan) -> Any:
    hint = "make the plan with this model"
    layers = {layer_index(name) for name in banks}
    strange = sorted(set(experts.experts_by_layer) - layers)
    if strange:
        yield Problem("expert plan", "names layers that have no experts", hint, strange)
    (held,) = {bank.down_proj.shape[0] for bank in banks.values()}
    if experts.num_experts != held:
        what = f"is for another number of experts than the model's {held}"
        yield Problem("expert plan", what, hint, experts.num_experts)


def _fingerprint(model: Any) -> str | None:
    """Of the base on disk; None when the model was made in memory."""
    name_or_path = getattr(model, "name_or_path", "")
    if not name_or_path:
        return None
    try:
        return base_fingerprint(Checkpoint.open(find_checkpoint(name_or_path, getattr(model, "base_revision", None))))
    except ModelError:
        return None


def _whole(value: float) -> float:
    """16.0 as 16, which is how PEFT writes alpha."""
    return int(value) if value == int(value) else value
