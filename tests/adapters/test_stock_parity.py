"""What we save, stock PEFT loads in a process of its own, and computes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.adapters.attach import attach, check_same_plan, load_adapter, save_adapter
from finetune.models.loading import load_model
from finetune.routing.plan import ExpertPlan
from tests.adapters.models import BOTH, SOME, logits, randomize
from tests.tiny import save_as_hub, tiny_dense, tiny_moe

EXPERTS = {"experts": BOTH, "rank": 5, "alpha": 8.0}
WITH_DENSE_LAYER = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
CASES = {
    "experts and attention, rank 5, six experts": (EXPERTS, None, {}),
    "H == I": (EXPERTS, None, {"moe_intermediate_size": 32}),
    "H == 2I": (EXPERTS, None, {"moe_intermediate_size": 16}),
    "only gate_up": ({**EXPERTS, "experts": ("gate_up_proj",)}, None, {}),
    "only down": ({**EXPERTS, "experts": ("down_proj",)}, None, {}),
    "only gate_up, some experts": ({**EXPERTS, "experts": ("gate_up_proj",), "attention": ()}, SOME, {}),
    "experts only": ({**EXPERTS, "attention": ()}, None, {}),
    "attention only": ({"rank": 5, "attention": ("q_proj", "o_proj")}, None, {}),
    "some experts": (EXPERTS, SOME, {}),
    "some layers": (EXPERTS, ExpertPlan({1: (0, 5)}, 6), {}),
    "another rank for experts": ({**EXPERTS, "rank": 4, "expert_rank": 7}, SOME, {}),
    "another alpha for experts": ({**EXPERTS, "expert_alpha": 3.5}, SOME, {}),
    "rslora": ({**EXPERTS, "rslora": True, "expert_rank": 3}, None, {}),
    "dropout": ({**EXPERTS, "dropout": 0.1, "expert_dropout": 0.3}, SOME, {}),
    "dense layer in a moe": ({**EXPERTS, "mlp": ("gate_proj", "up_proj", "down_proj")}, None, WITH_DENSE_LAYER),
    "only the dense layer of a moe": ({"rank": 3, "attention": (), "mlp": ("up_proj",)}, None, WITH_DENSE_LAYER),
    "router, lora": ({**EXPERTS, "rank": 2, "router": "lora"}, SOME, {}),
    "router, full": ({**EXPERTS, "router": "full"}, SOME, {}),
    "router, full, rslora": ({"rank": 2, "rslora": True, "router": "full"}, None, WITH_DENSE_LAYER),
    "dense model": ({"rank": 5, "mlp": ("gate_proj", "down_proj"), "dropout": 0.1}, None, "dense"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case trained (its B at random) and saved, and what stock PEFT makes of them."""
    root = tmp_path_factory.mktemp("parity")
    cases, pairs = {}, []
    for i, (name, (section, plan, config)) in enumerate(CASES.items()):
        model = tiny_dense() if config == "dense" else tiny_moe(**config)
        base, adapter = save_as_hub(model, root / f"base-{i}"), root / f"adapter-{i}"
        section, router = {k: v for k, v in section.items() if k != "router"}, section.get("router", "frozen")
        attached = attach(load_model(base, dtype=torch.float32), section, plan, seed=i, router=router)
        ours = randomize(attached).eval()
        save_adapter(ours, adapter)
        cases[name] = (ours, base, adapter)
        pairs += [str(base), str(adapter)]
    script, output = Path(__file__).with_name("stock_logits.py"), root / "logits.pt"
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(output), *pairs]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    stock = torch.load(output, weights_only=True)
    assert len(stock) == len(CASES)
    return {name: (*case, *stock[str(case[2])]) for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_computes_the_same(saved, name):
    ours, base, adapter, stock_logits, _ = saved[name]
    assert (logits(ours) - stock_logits).abs().max() <= 1e-4
    assert (logits(load_model(base, dtype=torch.float32)) - stock_logits).abs().max() > 1e-2
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_loads_without_complaint(saved, name):
    told = [text for text in saved[name][4] if "is_gradient_checkpointing" not in text]  # transformers, to PEFT
    told = [text for text in told if "mlp.gate(" not in text]  # PEFT looks for patterns of parameters among modules
    assert told == []


@pytest.mark.parametrize("name", CASES)
def test_we_load_it_back_bit_for_bit(saved, name):
    ours, base, adapter, *_ = saved[name]
    again = load_adapter(load_model(base, dtype=torch.float32), adapter)
    assert torch.equal(logits(again), logits(ours))
    mine, theirs = ours.peft_config["default"], again.peft_config["default"]
    for field in ("expert_plan", "lora_dropout", "expert_dropout", "section", "r", "rank_pattern", "target_modules"):
        assert getattr(mine, field) == getattr(theirs, field), field
    check_same_plan(ours, adapter)


def test_saving_again_writes_the_same_bytes(saved, tmp_path):
    for name, (_, base, adapter, *_) in saved.items():
        save_adapter(load_adapter(load_model(base, dtype=torch.float32), adapter), tmp_path / "again")
        for file in ("adapter_model.safetensors", "adapter_config.json", "finetune_adapter.json"):
            assert (tmp_path / "again" / file).read_bytes() == (adapter / file).read_bytes(), (name, file)
