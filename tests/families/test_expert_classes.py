"""Every class of experts that the installed transformers has: computed with its own numbers, or refused by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call

from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.expert_lora import LoraExperts
from finetune.architecture.expert_code import expert_code, known_experts
from finetune.architecture.registry import FAMILIES, family_of
from finetune.errors import AdapterError, ModelError
from finetune.models.live import computes_as_ours

MODELS = Path(transformers.__file__).parent / "models"
HIDDEN, WIDTH, EXPERTS, RANK, TOKENS = 16, 12, 5, 2, 7
ALWAYS_SILU = {"Lfm2MoeExperts"}
KNOWN_TO_DIFFER = {"GptOssExperts", "Llama4TextExperts", "AriaExperts", "DeepseekV4Experts"}


def classes() -> dict[str, str]:
    """Class -> the module it is in."""
    found = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        found |= dict.fromkeys(expert_code(file.read_text(encoding="utf-8")), module)
    return found


class Config:
    """Answers every question about sizes, whatever a class calls them."""

    _experts_implementation = "eager"

    def __init__(self, activation: str = "silu") -> None:
        self._activation = activation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return self._activation
        if "expert" in name and "intermediate" not in name and "size" not in name:
            return EXPERTS
        if any(word in name for word in ("intermediate", "ffn", "inner")):
            return WIDTH
        return HIDDEN if "hidden" in name or "size" in name or "dim" in name else 1


def built(name: str, module: str, activation: str = "silu") -> nn.Module:
    bank: nn.Module = getattr(importlib.import_module(module), name)(Config(activation))
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.2)
    return bank.requires_grad_(False)


def hosted(bank: nn.Module) -> LoraExperts:
    config = ExpertLoraConfig(r=RANK, target_modules=["experts"], expert_targets=("gate_up_proj", "down_proj"))
    layer = LoraExperts(bank, "default", config, "layers.0.mlp.experts")
    for name, factor in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(factor, std=0.2)
    return layer


def assert_same_numbers(bank: nn.Module, layer: LoraExperts) -> None:
    """Output and all gradients are those of the class's own forward with the factors' product added to its weights."""
    x = torch.randn(TOKENS, HIDDEN)
    logits = torch.randn(TOKENS, EXPERTS)
    weight, index = torch.topk(logits.softmax(-1), 2)
    factors = {name: p for name, p in layer.named_parameters() if "lora_" in name}
    results = []
    for compute in (layer, lambda *given: functional_call(bank, adapted(bank, layer), given)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = compute(inputs[0], index, inputs[1])
        gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [*inputs, *factors.values()])
        results.append([out, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def adapted(bank: nn.Module, layer: LoraExperts) -> dict[str, torch.Tensor]:
    """The bank's weights with what the factors add; every expert has its slot."""
    weights = dict(bank.named_parameters())
    for level in layer.levels:
        a_XRI, b_XOR = level.lora_A["default"].weight, level.lora_B["default"].weight
        weights[level.projection] = weights[level.projection] + level.scaling["default"] * (b_XOR @ a_XRI)
    return weights


def test_every_class_is_computed_as_it_is_or_refused_by_name():
    torch.manual_seed(0)
    computed, refused = [], []
    for name, module in classes().items():
        bank = built(name, module)
        if not computes_as_ours(type(bank)):
            refused.append(name)
            with pytest.raises(AdapterError, match=f"otherwise than our kernels do, got '{name}'"):
                hosted(bank)
            continue
        layer = hosted(bank)
        assert_same_numbers(bank, layer)
        computed.append(name)
        if name not in ALWAYS_SILU:
            with pytest.raises(AdapterError, match="does not use SiLU"):
                hosted(built(name, module, "gelu"))
    banks = {family.live.bank for family in FAMILIES.values() if family.live is not None}
    assert banks <= set(computed)
    assert len(computed) >= 30
    assert not KNOWN_TO_DIFFER & set(computed)
    assert set(computed) | set(refused) == set(classes())


def test_an_unknown_type_is_told_whether_its_experts_could_be_computed():
    for model_type, told in (("glm4_moe", True), ("gpt_oss", False), ("llama", False)):
        with pytest.raises(ModelError) as caught:
            family_of({"model_type": model_type}, "config.json")
        assert ("our kernels compute its experts" in caught.value.problems[0].hint) is told
    assert known_experts("glm4_moe") == known_experts("glm4_moe_text") != []
    assert known_experts("no_such_model") == known_experts("../llama") == known_experts(None) == []
