"""The layers that PEFT does not have, and the modules it is to wrap with them."""

from __future__ import annotations

from typing import TypeVar

from peft import LoraConfig

from finetune.adapters.expert_lora import LoraExperts
from finetune.adapters.router_lora import LoraRouter
from finetune.models.live import PackedBank, bank_classes, router_classes

C = TypeVar("C", bound=LoraConfig)


def with_our_layers(config: C) -> C:
    """`config`, by which PEFT wraps expert banks and routers with our layers; copy.deepcopy keeps that."""
    banks: dict[type, type] = dict.fromkeys((*bank_classes(), PackedBank), LoraExperts)
    config._register_custom_module({**banks, **dict.fromkeys(router_classes(), LoraRouter)})
    return config
