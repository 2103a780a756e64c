"""Adapted tiny models that the adapter tests share."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from finetune.adapters.attach import attach
from finetune.routing.plan import ExpertPlan
from tests.tiny import tiny_moe, token_ids

BOTH = ("gate_up_proj", "down_proj")
SOME = ExpertPlan({0: (1, 4), 1: (0, 2, 3)}, 6)


def randomize(model: PeftModel, seed: int = 1, std: float = 0.1) -> PeftModel:
    """Give every B random values, so that the adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "gate.lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapted(plan: ExpertPlan | None = SOME, *, dtype=torch.float32, config=None, **section) -> PeftModel:
    """A tiny MoE with adapters that change its output, in eval mode."""
    section = {"experts": BOTH, "rank": 3, **section}
    return randomize(attach(tiny_moe(dtype=dtype, **(config or {})), section, plan, seed=7)).eval()


def logits(model: torch.nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def tensors_of(model: PeftModel, part: str = "lora_") -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if part in name}
