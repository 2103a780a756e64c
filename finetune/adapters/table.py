"""What trains: targets by group, and whether gradients reach them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from finetune.adapters.expert_factors import ExpertFactors
from finetune.adapters.router_lora import LoraRouter
from finetune.errors import Problem, TrainingError
from finetune.models.qwen3 import ATTENTION_PROJECTIONS

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TargetGroup:
    """All weights of one kind that get factors.

    name: room and projection, like `attention.q_proj`, `experts.gate_up_proj`, `mlp.up_proj`.
    matched: weight matrices adapted; each trained expert of each layer counts.
    parameters: trainable parameters.
    share: of all parameters of the model, adapters included.
    """

    name: str
    matched: int
    parameters: int
    share: float


@dataclass(frozen=True)
class _Pair:
    group: str
    matched: int
    a: Tensor
    b: Tensor


def target_table(model: nn.Module) -> list[TargetGroup]:
    """The groups that train in `model`, attention first, then MLPs, then experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    groups: dict[str, list[_Pair]] = {}
    for pair in _trainable_pairs(model):
        groups.setdefault(pair.group, []).append(pair)
    rows = []
    for name in sorted(groups, key=_order):
        parameters = sum(t.numel() for pair in groups[name] for t in (pair.a, pair.b) if t.requires_grad)
        rows.append(TargetGroup(name, sum(pair.matched for pair in groups[name]), parameters, parameters / total))
    return rows


def trainable_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_gradients(model: nn.Module) -> None:
    """Call after the first backward: raises TrainingError that names each group no gradient reached.

    While a group's B is zero its A has no gradient, as it should be; B must have one. Once B is not zero both must.
    """
    problems = []
    pairs: dict[str, list[_Pair]] = {}
    for pair in _trainable_pairs(model):
        pairs.setdefault(pair.group, []).append(pair)
    for group in sorted(pairs, key=_order):
        started = any(bool(pair.b.detach().any()) for pair in pairs[group])
        for side in ("b", "a") if started else ("b",):
            weights = [w for pair in pairs[group] if (w := getattr(pair, side)).requires_grad]
            if weights and not any(w.grad is not None and bool(w.grad.any()) for w in weights):
                what = f"the gradient of {side.upper()} is zero everywhere after the first backward"
                problems.append(Problem(group, what, _NO_GRADIENT))
    if not pairs:
        hint = "attach adapters first, or load them with trainable=True"
        problems.append(Problem("adapters", "nothing trains", hint))
    if problems:
        raise TrainingError(*problems)


_NO_GRADIENT = "check that the rows carry loss tokens, and that the experts in the plan are used by this data"


def render_table(groups: list[TargetGroup]) -> Table:
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


def _trainable_pairs(model: nn.Module) -> Iterator[_Pair]:
    """A and B of every adapter on every target, where either trains."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            if a.requires_grad or b.requires_grad:
                matched = len(a) if isinstance(module, ExpertFactors) else 1
                yield _Pair(_group(name, module), matched, a, b)


def _group(name: str, module: Any) -> str:
    if isinstance(module, ExpertFactors):
        return f"experts.{module.projection}"
    projection = name.rpartition(".")[2]
    if isinstance(module, LoraRouter):
        return "router"
    return f"{'attention' if projection in ATTENTION_PROJECTIONS else 'mlp'}.{projection}"


_ROOMS = ("attention", "mlp", "experts", "router")
_PROJECTIONS = (*ATTENTION_PROJECTIONS, "gate_up_proj", "gate_proj", "up_proj", "down_proj")


def _order(group: str) -> tuple[int, int]:
    room, _, projection = group.partition(".")
    return _ROOMS.index(room), _PROJECTIONS.index(projection) if projection in _PROJECTIONS else len(_PROJECTIONS)
