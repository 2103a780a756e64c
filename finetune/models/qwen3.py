"""Where things are in a live Qwen3 or Qwen3-MoE of transformers: the only place that spells its module names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ModelError, Problem

DENSE, MOE = "qwen3", "qwen3_moe"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")
EXPERT_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The hub's matrices of one expert, one above the other, in each projection of a live bank."""

MLP = "mlp"
EXPERTS = "mlp.experts"
ROUTER = "mlp.gate"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def model_type(config: Any) -> str | None:
    """`model_type` of a config, be it an object or the content of config.json."""
    value = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return value if isinstance(value, str) else None


def is_qwen3(config: Any) -> bool:
    """Whether the config is of a Qwen3, dense or mixture-of-experts."""
    return model_type(config) in (DENSE, MOE)


def is_moe(config: Any) -> bool:
    """Whether the config is of a Qwen3-MoE."""
    return model_type(config) == MOE


def expert_bank_class() -> type[nn.Module]:
    """The module that holds all experts of a layer: gate_up_proj (E, 2I, H), down_proj (E, H, I)."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return Qwen3MoeExperts


class PackedBank(nn.Module):
    """What takes the place of that module when its weights are packed; gate_up_proj and down_proj are no parameters."""


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer's expert bank by module name, in layer order; empty for a dense model."""
    bank = (expert_bank_class(), PackedBank)
    return {name: module for name, module in model.named_modules() if isinstance(module, bank)}


def expert_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Whatever answers for the experts of each decoder layer that has any, by its index, in layer order.

    That is the bank of a plain model, its packed form, or the adapters around either: all are called with tokens
    (T, H), expert ids (T, K) and routing weights (T, K).
    """
    return {layer_index(name): module for name, module in model.named_modules() if name.endswith(f".{EXPERTS}")}


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def outside_experts(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer beside its experts and their router."""
    return [part for name, part in layer.named_children() if not (name == MLP and hasattr(part, "experts"))]


def router_class() -> type[nn.Module]:
    """The module that sends tokens to experts: weight (E, H)."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    return Qwen3MoeTopKRouter


def router_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Whatever answers for the router of each decoder layer that has one, by its index, in layer order.

    All return logits (T, E), routing weights (T, K) and expert ids (T, K).
    """
    return {layer_index(name): module for name, module in model.named_modules() if name.endswith(f".{ROUTER}")}


def route(router: Any, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `router` makes of other logits than its own: logits (T, E), routing weights (T, K), expert ids (T, K)."""
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, index_TK = torch.topk(probabilities_TE, router.top_k, dim=-1)
    if router.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return logits_TE, weights_TK.to(logits_TE.dtype), index_TK


def layer_index(name: str) -> int:
    """Index of the decoder layer a module or tensor name lies in. Raises ModelError when it lies in none."""
    match = _LAYER.search(name)
    if match is None:
        raise ModelError(Problem(name, "lies in no decoder layer", "give a name like model.layers.0.self_attn.q_proj"))
    return int(match[1])


def projection_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers called `targets` in attention and dense MLPs, in model order; never experts."""
    suffixes = tuple(
        f".{room}.{target}"
        for room, known in (("self_attn", ATTENTION_PROJECTIONS), ("mlp", MLP_PROJECTIONS))
        for target in targets
        if target in known
    )
    return [name for name, _ in model.named_modules() if name.endswith(suffixes)] if suffixes else []
