"""Where things are in a live model of transformers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.architecture.expert_code import expert_code, reference_code
from finetune.architecture.names import (
    ATTENTION,
    LINEAR_ATTENTION,
    MLP,
    is_bank,
    is_router,
    layer_index,
    linear_suffixes,
)
from finetune.architecture.registry import FAMILIES
from finetune.errors import ModelError, Problem


def bank_classes() -> tuple[type[nn.Module], ...]:
    """The modules that hold all experts of a layer: gate_up_proj (E, 2I, H), down_proj (E, H, I)."""
    return _classes("bank")


def router_classes() -> tuple[type[nn.Module], ...]:
    """The modules that send tokens to experts: weight (E, H)."""
    return _classes("router")


def _classes(kind: str) -> tuple[type[nn.Module], ...]:
    """Those whose modules are imported, as they are wherever a model was built; the others cannot be in any."""
    return tuple(
        getattr(sys.modules[live.module], getattr(live, kind)) for live in _LIVES if live.module in sys.modules
    )


_LIVES = tuple(family.live for family in FAMILIES.values() if family.live is not None)


def computes_as_ours(bank: type[nn.Module]) -> bool:
    """Whether a class of transformers computes experts as our kernels do: that of a family, or one of the same code."""
    if issubclass(bank, bank_classes()):
        return True
    file = inspect.getsourcefile(bank)
    code = expert_code(Path(file).read_text(encoding="utf-8")).get(bank.__name__) if file else None
    return code is not None and code == reference_code()


class PackedBank(nn.Module):
    """What takes the place of a bank when its weights are packed; gate_up_proj and down_proj are no parameters."""


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer's expert bank by module name, in layer order; empty for a dense model."""
    banks: tuple[type[nn.Module], ...] = (*bank_classes(), PackedBank)
    return {name: module for name, module in model.named_modules() if isinstance(module, banks)}


def expert_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Whatever answers for the experts of each decoder layer that has any, by its index, in layer order.

    That is the bank of a plain model, its packed form, or the adapters around either: all are called with tokens
    (T, H), expert ids (T, K) and routing weights (T, K).
    """
    return {layer_index(name): module for name, module in model.named_modules() if is_bank(name)}


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def outside_experts(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer beside its experts and their router."""
    return [part for name, part in layer.named_children() if not (name == MLP and hasattr(part, "experts"))]


def router_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Whatever answers for the router of each decoder layer that has one, by its index, in layer order.

    All return logits (T, E), routing weights (T, K) and expert ids (T, K).
    """
    return {layer_index(name): module for name, module in model.named_modules() if is_router(name)}


def route(router: Any, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `router` makes of other logits than its own: logits (T, E), routing weights (T, K), expert ids (T, K)."""
    live = next(live for live in _LIVES if live.router == type(router).__name__)
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, index_TK = torch.topk(probabilities_TE, router.top_k, dim=-1)
    if router.norm_topk_prob if live.normalizes is None else live.normalizes:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return logits_TE, weights_TK if live.float32_weights else weights_TK.to(logits_TE.dtype), index_TK


def projection_names(model: nn.Module, targets: Sequence[str], parents: Sequence[str] = (ATTENTION, MLP)) -> list[str]:
    """Names of the linear layers called `targets` in the modules `parents`, in model order; never routed experts."""
    suffixes = linear_suffixes(targets, parents)
    return [name for name, _ in model.named_modules() if name.endswith(suffixes)] if suffixes else []


def num_experts(model: nn.Module) -> int:
    """Experts of each layer that has any; 0 in a dense model."""
    sizes = {bank.down_proj.shape[0] for bank in _banks(model)}
    return sizes.pop() if sizes else 0


def expert_width(model: nn.Module) -> int:
    """The experts' inner width; 0 in a dense model."""
    widths = {bank.down_proj.shape[2] for bank in _banks(model)}
    return widths.pop() if widths else 0


def _banks(model: nn.Module) -> list[Any]:
    return list(expert_modules(model).values())


def has_linear_attention(model: nn.Module) -> bool:
    """Whether some layer carries a state from token to token, which packed rows would leak through."""
    return any(name.endswith(f".{LINEAR_ATTENTION}") for name, _ in model.named_modules())


def refuse_packed_rows(model: nn.Module) -> None:
    """Raises ModelError for a model that would let rows of a packed block see one another."""
    if has_linear_attention(model):
        what = "is true, but the model has linear attention, whose state would leak from row to row of a block"
        raise ModelError(Problem("data.packing", what, "write data.packing: false"))
