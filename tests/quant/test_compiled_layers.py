"""Packed decoder layers on the device path, compiled: one graph for all layers, and what plain ones compute."""

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("triton", reason="triton is made for Linux only")

from finetune.adapters.attach import attach
from finetune.models.live import expert_layers
from finetune.quant.experts import PackedExperts
from finetune.training import compiled
from finetune.training.compiled import compile_layers_
from tests.kernels.triton import interpreted  # noqa: F401
from tests.quant.packed import pack
from tests.tiny import tiny_moe

ADAPTER = {"attention": ["q_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 4, "alpha": 8, "dropout": 0.2}


def packed_model(scheme):
    """Two layers with packed experts on Triton's products, in training."""
    base = tiny_moe(vocab_size=64)
    for layer in base.model.layers:
        bank, layer.mlp.experts = layer.mlp.experts, PackedExperts(base.config)
        layer.mlp.experts.gate_up_proj = pack(bank.gate_up_proj.data, scheme, matrices=2)
        layer.mlp.experts.down_proj = pack(bank.down_proj.data, scheme)
    model = attach(base, ADAPTER, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    for experts in expert_layers(model).values():
        experts.backend = "triton"
    return model.train()


def step(model, num_tokens):
    torch.manual_seed(num_tokens)
    model.zero_grad()
    logits = model(input_ids=torch.arange(num_tokens)[None], use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("scheme", "mode"), [("nf4", "off"), ("fp8", "full"), ("nf4", "selective")])
def test_packed_layers_share_one_graph(scheme, mode, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    plain, made = packed_model(scheme), packed_model(scheme)
    layers = compile_layers_(made.get_base_model(), mode)
    for num_tokens in (5, 7):
        for ours, theirs in zip(step(made, num_tokens), step(plain, num_tokens), strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7
    assert layers.fault is None
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()
