"""Compiled decoder layers against plain ones: outputs, gradients, one graph whatever the block, no break in it."""

import shutil
from typing import ClassVar

import pytest
import torch
from torch._dynamo.utils import counters

from finetune.adapters.attach import attach
from finetune.routing.watch import LoadCounter
from finetune.training import compiled
from finetune.training.checkpointing import checkpoint_layers_
from finetune.training.compiled import compile_layers_
from tests.tiny import tiny_moe

ADAPTER = {"attention": ["q_proj", "o_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 4, "alpha": 8}


def model_of(dtype=torch.float32, **adapter):
    model = attach(tiny_moe(dtype=dtype, vocab_size=64), {**ADAPTER, **adapter}, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.train()


def blocks(number):
    """Packed blocks that differ in length and in their documents, two at least: one alone has no mask with sdpa."""
    generator = torch.Generator().manual_seed(2)
    for i in range(number):
        lengths = [3 + (7 * i + 5 * j) % 11 for j in range(2 + i % 4)]
        positions = torch.cat([torch.arange(length) for length in lengths])
        yield torch.randint(0, 64, (1, len(positions)), generator=generator), positions[None]


def step(model, ids, positions, dtype):
    """The logits and every gradient."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "dtype", "dropout"),
    [("off", torch.float32, 0.0), ("full", torch.bfloat16, 0.2), ("selective", torch.float32, 0.2)],
)
def test_layers_share_one_graph_over_twenty_blocks(mode, dtype, dropout, graphs):
    plain, made = model_of(dtype, dropout=dropout), model_of(dtype, dropout=dropout)
    names = list(made.state_dict())
    layers = compile_layers_(made.get_base_model(), mode)
    assert list(made.state_dict()) == names
    load = LoadCounter(made.get_base_model().model, 6)
    tokens = 0
    with load.listening():
        for ids, positions in blocks(20):
            got, expected = step(made, ids, positions, dtype), step(plain, ids, positions, dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            for ours, theirs in zip(got, expected, strict=True):
                assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-7
            tokens += ids.numel()
    assert layers.fault is None
    assert graphs["stats"]["unique_graphs"] == 1
    assert not graphs["graph_break"]
    counts_LE = load.take()
    assert counts_LE[0].sum() in (2 * tokens, 4 * tokens)  # top 2; a repeated layer may count again
    assert counts_LE[0].sum() == counts_LE[1].sum()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_uncompiled_checkpointing_is_bit_equal(mode):
    plain, made = model_of(dropout=0.2), model_of(dropout=0.2)
    checkpoint_layers_(made.get_base_model(), mode)
    for ids, positions in blocks(3):
        pairs = zip(step(made, ids, positions, None), step(plain, ids, positions, None), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_selective_computes_no_expert_again(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names.append(op._schema.name)
            return op(*args, **(kwargs or {}))

    made = model_of()
    checkpoint_layers_(made.get_base_model(), "selective")
    with Calls() as calls:
        step(made, *next(blocks(1)), None)
    assert calls.names.count("finetune::expert_mlp_slices") == 2
    assert sum("attention" in name and "backward" not in name for name in calls.names) == 2


def test_what_does_not_compile_says_why_once_and_runs(caplog):
    made, plain = model_of(), model_of()
    layers = compile_layers_(made.get_base_model(), "off")

    def breaks(module, args):
        torch._dynamo.graph_break()

    for layer in made.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(breaks)
    ids, positions = next(blocks(1))
    for _ in range(2):
        pairs = zip(step(made, ids, positions, None), step(plain, ids, positions, None), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert layers.fault
    assert sum("run uncompiled" in record.message for record in caplog.records) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiler_that_runs_use_agrees(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    plain, made = model_of(), model_of()
    layers = compile_layers_(made.get_base_model(), "selective")
    for ids, positions in blocks(2):
        got, expected = step(made, ids, positions, None), step(plain, ids, positions, None)
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7
    assert layers.fault is None
