"""LoRA on a router: its logits change, and what follows from them is computed as before.

`full` moves the whole weight (E, H) by a delta in fp32. On disk and in PEFT's eyes that is LoRA of rank E with the
delta as A and the identity as B, which no optimizer sees; so it saves, loads, merges and verifies as all LoRA does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from finetune.adapters.config import ExpertLoraConfig
from finetune.models.live import route


class LoraRouter(Linear):
    """Takes the place of a router; returns logits (T, E), routing weights (T, K) and expert ids (T, K) as it does."""

    if TYPE_CHECKING:  # attributes of PEFT's untyped half

        def __getattr__(self, name: str) -> Any: ...

    def _get_in_out_features(self, router: nn.Module) -> tuple[int, int]:
        num_experts, hidden = router.get_parameter("weight").shape
        return hidden, num_experts

    def update_layer(self, adapter_name: str, r: int, *args: Any, config: ExpertLoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Routers know no dropout: it would change the choice of experts from call to call."""
        super().update_layer(adapter_name, r, *args, config=config, **kwargs)
        self.lora_dropout[adapter_name] = nn.Identity()
        if config.router == "full":
            nn.init.zeros_(self.lora_A[adapter_name].weight)
            self.lora_B[adapter_name] = FrozenIdentity(r).to(self.lora_A[adapter_name].weight.device)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens (T, H); with adapters disabled, as the frozen router does."""
        router = self.get_base_layer()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            frozen: tuple[Tensor, Tensor, Tensor] = router(hidden_states)
            return frozen
        x_TH = hidden_states.reshape(-1, self.in_features)
        logits_TE = linear(x_TH, router.weight)
        dtype = logits_TE.dtype
        for name in () if self.merged else self.active_adapters:
            if name in self.lora_A:
                a_RH, b_ER = self.lora_A[name].weight, self.lora_B[name].weight
                logits_TE = logits_TE + self.scaling[name] * linear(linear(x_TH.to(a_RH.dtype), a_RH), b_ER)
        return route(router, logits_TE.to(dtype))


class FrozenIdentity(nn.Module):
    """A B that is the identity and never trains: a buffer, so that nothing that enables gradients reaches it."""

    weight: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(size))
