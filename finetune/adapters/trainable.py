"""What trains: targets by group, and whether gradients reach them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from finetune.adapters.expert_factors import ExpertFactors
from finetune.adapters.router_lora import LoraRouter
from finetune.architecture.names import (
    ATTENTION_PROJECTIONS,
    EXPERT_PROJECTIONS,
    LINEAR_ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    in_shared_expert,
)
from finetune.errors import Problem, TrainingError
from finetune.quant.experts import count_weights

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TrainableGroup:
    """All weights of one kind that train, mostly by factors.

    name: kind and projection, like `attention.o_proj`, `experts.down_proj`, `mlp.up_proj`.
    matched: weight matrices adapted; each trained expert of each layer counts.
    parameters: trainable parameters.
    share: of all parameters of the model, adapters included.
    """

    name: str
    matched: int
    parameters: int
    share: float


@dataclass(frozen=True)
class _Trained:
    """What trains of one module: A and B, or the change of whole experts.

    sides: name and weight, those first that have a gradient from the first step on.
    """

    group: str
    matched: int
    sides: dict[str, Tensor]


def trainable_groups(model: nn.Module) -> list[TrainableGroup]:
    """The groups that train in `model`, attention first, then MLPs, then experts."""
    total = count_weights(model)
    groups = _groups(model)
    rows = []
    for name in sorted(groups, key=_order):
        parameters = sum(t.numel() for trained in groups[name] for t in trained.sides.values() if t.requires_grad)
        rows.append(
            TrainableGroup(name, sum(trained.matched for trained in groups[name]), parameters, parameters / total)
        )
    return rows


def trainable_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_gradients(model: nn.Module) -> None:
    """Call after the first backward: raises TrainingError that names each group no gradient reached.

    While a group's B is zero its A has no gradient, as it should be; B must have one. Once B is not zero both must.
    """
    problems = []
    groups = _groups(model)
    for group in sorted(groups, key=_order):
        sides = list(groups[group][0].sides)
        started = any(bool(trained.sides[sides[0]].detach().any()) for trained in groups[group])
        for side in sides if started else sides[:1]:
            weights = [weight for trained in groups[group] if (weight := trained.sides[side]).requires_grad]
            if weights and not any(w.grad is not None and bool(w.grad.any()) for w in weights):
                what = f"the gradient of {side} is zero everywhere after the first backward"
                problems.append(Problem(group, what, _NO_GRADIENT))
    if not groups:
        hint = "attach adapters first, or load them with trainable=True"
        problems.append(Problem("adapters", "nothing trains", hint))
    if problems:
        raise TrainingError(*problems)


_NO_GRADIENT = "check that the rows carry loss tokens, and that the experts in the plan are used by this data"


def render_groups(groups: list[TrainableGroup]) -> Table:
    """`groups` for a terminal or notebook."""
    from rich.table import Table

    table = Table("target", title="what trains")
    for column in ("matrices", "parameters", "share"):
        table.add_column(column, justify="right")
    for group in groups:
        table.add_row(group.name, f"{group.matched:,}", f"{group.parameters:,}", f"{group.share:.3%}")
    total = sum(group.parameters for group in groups)
    table.add_section()
    matched, share = sum(group.matched for group in groups), sum(group.share for group in groups)
    table.add_row("total", f"{matched:,}", f"{total:,}", f"{share:.3%}")
    return table


def _groups(model: nn.Module) -> dict[str, list[_Trained]]:
    groups: dict[str, list[_Trained]] = {}
    for trained in _trained(model):
        groups.setdefault(trained.group, []).append(trained)
    return groups


def _trained(model: nn.Module) -> Iterator[_Trained]:
    """What every adapter trains on every target."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        experts = isinstance(module, ExpertFactors)
        for adapter in (*module.lora_A, *(module.lora_delta if experts else ())):
            sides = {"B": "lora_B", "A": "lora_A"} if adapter in module.lora_A else {"the weights": "lora_delta"}
            weights = {side: getattr(module, holder)[adapter].weight for side, holder in sides.items()}
            if any(weight.requires_grad for weight in weights.values()):
                matched = len(module.trained(adapter).experts) if experts else 1
                yield _Trained(_group(name, module), matched, weights)


def _group(name: str, module: Any) -> str:
    if isinstance(module, ExpertFactors):
        return f"experts.{module.projection}"
    projection = name.rpartition(".")[2]
    if isinstance(module, LoraRouter):
        return "router"
    if in_shared_expert(name):
        return f"shared_expert.{projection}"
    kind = "mlp" if projection in MLP_PROJECTIONS else "attention"
    return f"{'linear_attention' if projection in LINEAR_ATTENTION_PROJECTIONS else kind}.{projection}"


_KINDS = ("attention", "linear_attention", "mlp", "shared_expert", "experts", "router")
_PROJECTIONS = (*ATTENTION_PROJECTIONS, *LINEAR_ATTENTION_PROJECTIONS, EXPERT_PROJECTIONS[0], *MLP_PROJECTIONS)


def _order(group: str) -> tuple[int, int]:
    kind, _, projection = group.partition(".")
    return _KINDS.index(kind), _PROJECTIONS.index(projection) if projection in _PROJECTIONS else len(_PROJECTIONS)
