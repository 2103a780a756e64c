"""Modules that get LoRA, by the names of other tools."""

from __future__ import annotations

from typing import Any

from finetune.architecture.names import (
    ATTENTION_PROJECTIONS,
    EXPERT_MATRICES,
    EXPERT_PROJECTIONS,
    LINEAR_ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
)
from finetune.conversion.model_names import Model
from finetune.conversion.outcome import DroppedError
from finetune.conversion.values import Fields

TARGETS = (
    "target_modules", "lora_target_modules", "lora_target", "lora_target_linear", "target_parameters",
    "lora_target_parameters",
)  # fmt: skip
BANKS = ("target_parameters", "lora_target_parameters")
_ALL = ("all", "all-linear", "all_linear")
_PATTERN = "(|*\\[^$"


def targets(key: str, value: Any, model: Model, rank: int) -> Fields:
    """Projections by the last words of module names; where the model has experts, those of MLPs are theirs.

    Experts get rank / active experts, unless their banks are named themselves.
    """
    if value is True or value in _ALL or (isinstance(value, list | tuple) and any(name in _ALL for name in value)):
        return _everything(model, rank)
    if not isinstance(value, str | list | tuple):
        raise DroppedError("is no list of modules: see adapter.attention, adapter.experts and adapter.mlp")
    if isinstance(value, str) and any(mark in value for mark in _PATTERN):
        raise DroppedError("a pattern: name projections in adapter.attention, adapter.experts and adapter.mlp")
    names = [str(name).strip() for name in (value.split(",") if isinstance(value, str) else value)]
    of_shared = {name.rpartition(".")[2] for name in names if "shared_expert" in name}
    last = {name.rpartition(".")[2] for name in names if "shared_expert" not in name}
    found: Fields = {
        "adapter.attention": [name for name in ATTENTION_PROJECTIONS if name in last],
        "adapter.linear_attention": [name for name in LINEAR_ATTENTION_PROJECTIONS if name in last],
        "adapter.shared_expert": [name for name in MLP_PROJECTIONS if name in of_shared],
    }
    if model.is_moe:
        wanted = {name: {name, *EXPERT_MATRICES[name]} for name in EXPERT_PROJECTIONS}
        found["adapter.experts"] = [name for name in EXPERT_PROJECTIONS if wanted[name] & last]
        if found["adapter.experts"] and key not in BANKS:
            found["adapter.expert_rank"] = max(1, rank // model.active)
    else:
        found["adapter.mlp"] = [name for name in MLP_PROJECTIONS if name in last]
    found = {field: named for field, named in found.items() if named}
    if not found:
        raise DroppedError("names nothing that these models have: see adapter.attention, adapter.experts, adapter.mlp")
    return found


def _everything(model: Model, rank: int) -> Fields:
    found: Fields = {"adapter.attention": list(ATTENTION_PROJECTIONS)}
    if not model.is_moe:
        return found | {"adapter.mlp": list(MLP_PROJECTIONS)}
    return found | {
        "adapter.experts": list(EXPERT_PROJECTIONS),
        "adapter.expert_rank": max(1, rank // model.active),
    }
