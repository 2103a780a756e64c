"""Expert layers are prepared before the first step: backends by name, products chosen with adapters and without."""

import pytest
import torch

from finetune.adapters import expert_lora
from finetune.adapters.attach import attach
from finetune.adapters.expert_lora import LoraExperts
from finetune.errors import AdapterError
from finetune.kernels import ops
from finetune.kernels.prepare import prepare_experts, tune_experts
from finetune.kernels.tiles import Load
from tests.tiny import tiny_moe

SECTION = {"attention": ["q_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 4}


def test_every_layer_is_prepared_with_adapters_and_without(monkeypatch):
    model, prepared = attach(tiny_moe(), SECTION, seed=0), []
    layers = [module for module in model.modules() if isinstance(module, LoraExperts)]
    monkeypatch.setattr(ops, "_choose", lambda backend, layer: prepared.append((backend, layer.gate_up_lora is None)))
    prepare_experts(model, "torch")
    assert [layer.backend for layer in layers] == ["torch"] * len(layers)
    assert prepared == [("torch", False), ("torch", True)] * len(layers)


def test_products_are_chosen_in_the_type_of_autocast(monkeypatch):
    model, types = attach(tiny_moe(), SECTION, seed=0), set()
    monkeypatch.setattr(ops, "_choose", lambda backend, layer: types.add(layer.compute_dtype()))
    with torch.autocast("cpu", torch.bfloat16):
        prepare_experts(model)
    assert types == {torch.bfloat16}


def test_a_backend_that_cannot_run_is_an_error_before_the_first_step(monkeypatch):
    monkeypatch.setattr(ops, "triton_fault", lambda device: "no GPU")
    ops._choose_products.cache_clear()
    with pytest.raises(AdapterError, match="cannot run here: triton products: no GPU"):
        prepare_experts(attach(tiny_moe(), SECTION, seed=0), "triton")


def test_a_run_tunes_every_layer_for_its_load_with_its_adapters(monkeypatch):
    model, tuned = attach(tiny_moe(), SECTION, seed=0), []
    monkeypatch.setattr(expert_lora, "tune", lambda layer, load, backend: tuned.append((layer, load)))
    tune_experts(model, Load(1024, 2))
    assert len(tuned) == sum(isinstance(module, LoraExperts) for module in model.modules()) > 0
    assert all(layer.gate_up_lora is not None and load == (1024, 2) for layer, load in tuned)
