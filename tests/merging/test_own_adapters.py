"""Adapters made here, with a plan of experts: saved, merged, verified, and read by stock PEFT."""

import re

import pytest
import torch

from finetune.adapters.attach import attach, load_adapter, save_adapter
from finetune.adapters.files import AdapterFiles
from finetune.errors import AdapterError, ModelError, VerifyError
from finetune.formats.export import export
from finetune.formats.import_adapter import import_adapter
from finetune.formats.registry import make_format
from finetune.merging.merge import merge
from finetune.models.loading import load_model
from finetune.routing.plan import ExpertPlan
from finetune.verification.verify import verify
from tests.checkpoints import (
    MOE,
    edit_tensors,
    names_like,
    plain_logits,
    read_all,
    stock_logits,
    token_batch,
    write_base,
)

PLAN = ExpertPlan(experts_by_layer={0: (0, 3), 1: (2,)}, num_experts=5)
HOT = "model.layers.0.mlp.experts.3.up_proj.weight"
MIXED = {**MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}
ALL = {"attention": ("q_proj", "v_proj"), "experts": ("gate_up_proj", "down_proj"), "mlp": ("up_proj",)}


def train(base, path, adapter, plan=None, **options):
    model = attach(load_model(base, dtype=torch.float32), adapter, plan, seed=0, **options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "gate.lora_A" in name or "lora_delta" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    save_adapter(model, path)
    return path


@pytest.mark.parametrize(
    "adapter",
    [
        {**ALL, "rank": 4, "expert_rank": 3, "expert_alpha": 5.0, "rslora": True, "dropout": 0.1},
        {"attention": (), "experts": ("gate_up_proj",), "rank": 2},
        {"attention": (), "experts": ("down_proj",), "rank": 2},
        {"attention": ("o_proj",), "mlp": ("gate_proj", "down_proj"), "rank": 2},
    ],
)
def test_merged_equals_adapter_and_verifies(tmp_path, adapter):
    base = write_base(tmp_path / "base", MIXED)
    path = train(base, tmp_path / "adapter", adapter)
    report = merge(path, tmp_path / "merged")
    assert not report.warnings  # the fingerprint of the base was recorded and fits
    assert (stock_logits(base, path) - plain_logits(tmp_path / "merged")).abs().max() <= 1e-4
    assert verify(path, tmp_path / "merged").logits.max_difference <= 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_router_that_trained_merges_and_verifies(tmp_path, kind):
    base = write_base(tmp_path / "base", MIXED)
    path = train(base, tmp_path / "adapter", {"attention": (), "experts": ("down_proj",), "rank": 2}, router=kind)
    report = merge(path, tmp_path / "merged")
    assert report.retention["router"].tensors == 2
    assert (stock_logits(base, path) - plain_logits(tmp_path / "merged")).abs().max() <= 1e-4
    assert verify(path, tmp_path / "merged").weights["router"].tensors == 2
    export(path, tmp_path / "peft", "peft")
    assert (stock_logits(base, tmp_path / "peft") - stock_logits(base, path)).abs().max() <= 1e-4
    with pytest.raises(AdapterError, match="merge it and serve the merged model"):
        export(path, tmp_path / "vllm", "vllm")


@pytest.mark.parametrize("to", ["peft", "peft-per-expert", "vllm", "sglang", "gguf-lora"])
def test_whole_experts_fit_in_no_adapter_format(tmp_path, to):
    base = write_base(tmp_path / "base", MOE)
    path = train(base, tmp_path / "adapter", {**ALL, "mlp": (), "rank": 2}, PLAN, expert_mode="full")
    with pytest.raises(AdapterError, match="no format of adapters can hold"):
        export(path, tmp_path / "out", to)
    with pytest.raises(AdapterError):
        import_adapter(path, tmp_path / "out")


def test_whole_experts_merge_beside_factors(tmp_path):
    base = write_base(tmp_path / "base", MIXED, shards=1)
    plan = ExpertPlan({0: (0, 3), 2: (1,)}, 5)
    path = train(base, tmp_path / "adapter", {**ALL, "rank": 2}, plan, expert_mode="full")
    merge(path, tmp_path / "merged")
    live = load_adapter(load_model(base, dtype=torch.float32), path)
    with torch.no_grad():
        adapted = live(input_ids=token_batch()).logits
    assert (adapted - plain_logits(tmp_path / "merged")).abs().max() <= 1e-4
    assert verify(path, tmp_path / "merged").logits.max_difference <= 1e-4
    other = train(base, tmp_path / "other", {**ALL, "mlp": (), "rank": 2}, ExpertPlan({0: (0, 1)}, 5))
    merge([path, other], tmp_path / "both", weights=[0.5, 2.0])
    verify([path, other], tmp_path / "both", weights=[0.5, 2.0])
    edit_tensors(tmp_path / "both" / "model.safetensors", lambda tensors: tensors[HOT].mul_(1.001))
    with pytest.raises(VerifyError, match=HOT):
        verify([path, other], tmp_path / "both", weights=[0.5, 2.0])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_experts_outside_the_plan_keep_their_bits(tmp_path, mode):
    base = write_base(tmp_path / "base", MOE, dtype=torch.bfloat16)
    section = {**ALL, "mlp": (), "attention": (), "rank": 2}
    path = train(base, tmp_path / "adapter", section, PLAN, expert_mode=mode)
    report = merge(path, tmp_path / "merged")
    before, after = read_all(base), read_all(tmp_path / "merged")
    changed = {tuple(name.split(".")[2:6:3]) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {("0", "0"), ("0", "3"), ("1", "2")}
    assert report.tensors_changed == 9
    verify(path, tmp_path / "merged")


@pytest.mark.parametrize("to", ["peft", "peft-per-expert", "vllm", "sglang"])
def test_an_export_changes_the_experts_of_the_plan_alone(tmp_path, to):
    base = write_base(tmp_path / "base", MIXED)
    plan = ExpertPlan({0: (0, 3), 2: (1,)}, 5)
    adapter = train(base, tmp_path / "adapter", {**ALL, "rank": 2}, plan)
    export(adapter, tmp_path / "out", make_format(to, {"dtype": "fp32"}))
    merge(adapter, tmp_path / "merged")
    merge(tmp_path / "out", tmp_path / "merged-out", base=base)
    before, merged, exported = (read_all(tmp_path / name) for name in ("base", "merged", "merged-out"))
    for name, weight in exported.items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0)
        if match := re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)", name):
            trains = int(match[2]) in plan.experts_by_layer[int(match[1])]
            assert torch.equal(weight, before[name]) is not trains, name
    assert (plain_logits(tmp_path / "merged-out") - stock_logits(base, adapter)).abs().max() <= 1e-4


def test_base_that_changed_since_training(tmp_path):
    base = write_base(tmp_path / "base", MOE, shards=1)
    path = train(base, tmp_path / "adapter", {"rank": 2})
    assert AdapterFiles.open(path).base_fingerprint

    def change(tensors):
        for name in names_like("proj", tensors):
            tensors[name] += 1

    edit_tensors(base / "model.safetensors", change)
    with pytest.raises(ModelError, match="fingerprint differs"):
        merge(path, tmp_path / "merged")
