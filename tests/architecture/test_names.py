"""Names of modules and weights, and that nothing else spells them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.architecture import names
from finetune.architecture.registry import FAMILIES, find_family, is_moe
from tests.tiny import tiny_dense, tiny_moe

ROOT = Path(__file__).resolve().parents[2]
SPELLED = re.compile(r"mlp\.(experts|gate)\b|self_attn|\bq_proj\b|\"gate_up_proj\"|qwen3_moe|[\"']model\.layers")


def test_nothing_outside_of_architecture_spells_a_module_or_a_model_type():
    files = [path for path in (ROOT / "finetune").rglob("*.py") if path.parent.name != "architecture"]
    assert len(files) > 150
    lines = [(path, number, line) for path in files for number, line in enumerate(path.read_text().splitlines(), 1)]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path, number, line in lines if SPELLED.search(line)
    ]
    assert found == []


def test_kinds_of_config():
    assert is_moe(tiny_moe().config)
    assert not is_moe(tiny_dense().config)
    assert find_family(tiny_dense().config) is FAMILIES["qwen3"]
    assert is_moe({"model_type": "qwen3_moe"})
    for unknown in ({"model_type": "qwen2_moe"}, {}, None, {"model_type": 3}):
        assert find_family(unknown) is None


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "attention"),
        ("model.layers.3.mlp.experts.11.gate_proj.weight", "expert gate"),
        ("model.layers.3.mlp.experts.11.down_proj.weight", "expert down"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("lm_head.weight", "other"),
        ("model.layers.3.input_layernorm.weight", "other"),
    ],
)
def test_kind_of_a_weight(weight, kind):
    assert names.kind_of(weight) == kind


def test_a_matrix_of_an_expert_and_back():
    module = names.expert_module(names.bank_name(7), 12, "up_proj")
    assert names.expert_matrix(module) == ("model.layers.7.mlp.experts", 12, "up_proj")
    assert names.expert_matrix(module).projection == "gate_up_proj"
    assert names.place_in_layer(module) == "mlp.experts.up_proj"
    for other in (names.bank_name(7), f"{module}.weight", "model.layers.7.mlp.up_proj", names.HEAD):
        assert names.expert_matrix(other) is None
    assert names.place_in_layer("model.layers.10.self_attn.q_proj") == "self_attn.q_proj"
    assert names.place_in_layer(names.HEAD) == names.HEAD


def test_every_module_of_a_live_model_has_a_name_in_a_gguf():
    for model in (tiny_moe(mlp_only_layers=[1]), tiny_dense()):
        family = find_family(model.config)
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            if parameter.ndim == 3:
                bank, _, projection = name.rpartition(".")
                modules = [names.expert_module(bank, 0, matrix) for matrix in names.EXPERT_MATRICES[projection]]
            else:
                modules = [module]
            assert all(names.place_in_layer(each) in family.gguf_names for each in modules), name
