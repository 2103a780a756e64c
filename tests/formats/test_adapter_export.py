"""Adapters in other layouts make the same change, by stock PEFT and by reading them back."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from finetune.adapters.files import AdapterFiles
from finetune.errors import AdapterError, UserError
from finetune.formats.export import export
from finetune.formats.registry import make_format
from finetune.merging.merge import merge
from finetune.merging.plan import plan_merge
from tests.checkpoints import (
    ATTENTION,
    DENSE,
    EXPERTS,
    MOE,
    read_all,
    stock_logits,
    write_adapter,
    write_base,
)

MIXED = {**MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}
SOURCES = {
    "attention and experts": (MOE, {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "gate_up only": (MOE, {"target_modules": [], "target_parameters": EXPERTS[:1]}),
    "down only": (MOE, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "one layer": (MOE, {"target_modules": ["v_proj"], "target_parameters": [f"layers.1.{name}" for name in EXPERTS]}),
    "rslora and ranks": (
        MOE,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"mlp\.experts\.gate_up_proj": 3},
        },
    ),
    "dense": (DENSE, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "dense, one layer": (DENSE, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "dense layer in MoE": (
        MIXED,
        {"target_modules": ["v_proj"], "target_parameters": [*EXPERTS, "mlp.up_proj.weight"]},
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}
    for name, (config, chosen) in SOURCES.items():
        folder = tmp_path_factory.mktemp("source")
        base = write_base(folder / "base", config)
        made[name] = base, write_adapter(folder / "adapter", base, std=0.1, **chosen)
    return made


def deltas(adapter, base):
    """Weight -> its change in float64, for changes that are not zero."""
    plan = plan_merge(adapter, base)
    found = {name: plan.read(name) for name in plan.kinds}
    return {name: low.scale * low.b.double() @ low.a.double() for name, low in found.items() if low is not None}


def assert_same(one, other, atol):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=atol), name


@pytest.mark.parametrize("to", ["peft", "peft-per-expert", "vllm", "sglang"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_change_stays_the_same(sources, tmp_path, name, to):
    base, adapter = sources[name]
    report = export(adapter, tmp_path / "out", make_format(to, {"dtype": "fp32"}))
    assert_same(deltas(adapter, base), deltas(tmp_path / "out", base), atol=1e-6)
    assert report.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "SERVING.md"}
    assert json.loads(json.dumps(report.to_dict()))["tensors"] == len(read_all(tmp_path / "out"))


@pytest.mark.parametrize("to", ["peft", "peft-per-expert"])
@pytest.mark.parametrize("name", [name for name in SOURCES if name != "dense layer in MoE"])
def test_stock_peft_reads_it(sources, tmp_path, name, to):
    base, adapter = sources[name]
    export(adapter, tmp_path / "out", to)
    assert (stock_logits(base, adapter) - stock_logits(base, tmp_path / "out")).abs().max() <= 1e-4


def test_peft_is_exact_and_goes_round(sources, tmp_path):
    base, adapter = sources["attention and experts"]
    export(adapter, tmp_path / "one", "peft")
    before, after = read_all(adapter), read_all(tmp_path / "one")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    export(tmp_path / "one", tmp_path / "single", "peft-per-expert", base=base)
    export(tmp_path / "single", tmp_path / "two", "peft", base=base)
    again = read_all(tmp_path / "two")
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_served_adapters_are_complete_and_of_one_rank(sources, tmp_path, to):
    base, adapter = sources["down only"]
    report = export(adapter, tmp_path / "out", to)
    tensors, config = read_all(tmp_path / "out"), json.loads((tmp_path / "out/adapter_config.json").read_text())
    names = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}_proj.lora_{side}.weight"
        for layer in range(2)
        for expert in range(5)
        for part in ("gate", "up", "down")
        for side in "AB"
    }
    assert tensors.keys() == names
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert config["r"] == config["lora_alpha"] == report.facts["rank"] == 8  # 5, padded to what the servers accept
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {8}
    note = (tmp_path / "out/SERVING.md").read_text()
    assert str(base) in note
    assert "rank 8" in note
    assert "enable_thinking" in note


def test_thinking_is_told(sources, tmp_path):
    adapter = sources["dense"][1]
    export(adapter, tmp_path / "on", make_format("vllm", {"thinking": True}))
    export(adapter, tmp_path / "off", "vllm")
    assert "default, true" in (tmp_path / "on/SERVING.md").read_text()
    assert '"enable_thinking": false' in (tmp_path / "off/SERVING.md").read_text()


def test_thinking_is_what_training_wrote_down(sources, tmp_path):
    shutil.copytree(sources["dense"][1], tmp_path / "adapter")
    (tmp_path / "adapter/finetune_adapter.json").write_text(json.dumps({"format_version": 1, "thinking": True}))
    export(tmp_path / "adapter", tmp_path / "told", "vllm")
    export(tmp_path / "adapter", tmp_path / "asked", make_format("vllm", {"thinking": False}))
    assert "default, true" in (tmp_path / "told/SERVING.md").read_text()
    assert '"enable_thinking": false' in (tmp_path / "asked/SERVING.md").read_text()


def test_exported_and_merged_equals_merged(sources, tmp_path):
    base, adapter = sources["rslora and ranks"]
    export(adapter, tmp_path / "out", make_format("vllm", {"dtype": "fp32"}))
    merge(adapter, tmp_path / "one")
    merge(tmp_path / "out", tmp_path / "two", base=base)
    one, two = read_all(tmp_path / "one"), read_all(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_what_cannot_be_said_is_refused(tmp_path):
    base = write_base(tmp_path / "base", MOE)
    router = write_adapter(tmp_path / "router", base, target_modules="all-linear")
    with pytest.raises(AdapterError, match="servers do not apply"):
        export(router, tmp_path / "out", "vllm")
    wide = write_adapter(tmp_path / "wide", base, r=513, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="at most 512"):
        export(wide, tmp_path / "out", "sglang")
    with pytest.raises(UserError, match="none of peft"):
        export(wide, tmp_path / "out", "onnx")
    with pytest.raises(AdapterError, match="fp32 or fp16"):
        export(wide, tmp_path / "out", make_format("gguf-lora", {"dtype": "bf16"}))
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_are_refused(sources, tmp_path):
    from tests.checkpoints import edit_tensors

    base = write_base(tmp_path / "base", MOE)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).fill_(1e6))
    with pytest.raises(AdapterError, match="not finite"):
        export(adapter, tmp_path / "out", make_format("peft", {"dtype": "fp16"}))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("any") / "base", MOE)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 6),
    alpha=st.sampled_from([1, 3, 8, 16.5]),
    targets=st.sampled_from([EXPERTS, EXPERTS[:1], EXPERTS[1:]]),
    attention=st.lists(st.sampled_from(ATTENTION), unique=True),
    frozen=st.sets(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 99),
    to=st.sampled_from(["peft", "peft-per-expert", "vllm", "sglang"]),
)
def test_any_adapter_any_layout(moe, tmp_path_factory, rank, alpha, targets, attention, frozen, seed, to):
    folder = tmp_path_factory.mktemp("adapter")
    adapter = packed(folder / "adapter", moe, rank, alpha, targets, attention, frozen, seed)
    export(adapter, folder / "out", make_format(to, {"dtype": "fp32"}))
    assert_same(deltas(adapter, moe), deltas(folder / "out", moe), atol=1e-5)
    assert AdapterFiles.open(folder / "out").num_experts == (
        AdapterFiles.open(adapter).num_experts if to == "peft" else {}
    )


def packed(path, base, rank, alpha, targets, attention, frozen, seed):
    """A stock adapter without building a model: MOE's shapes, random factors, B of frozen experts zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(module, a_shape, b_shape):
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(a_shape, generator=generator)
        b = torch.randn(b_shape, generator=generator)
        if "experts" in module:
            b.view(b_shape[0], rank, 5)[:, :, sorted(frozen)] = 0
        tensors[f"base_model.model.{module}.lora_B.weight"] = b

    sizes = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name in attention:
            out, width = sizes[name]
            add(f"{at}.self_attn.{name}", (rank, width), (out, rank))
        for target in targets:
            out, width = (32, 24) if "gate_up" in target else (24, 16)
            inner = ".base_layer" if "gate_up" in target and len(targets) == 2 else ""
            add(f"{at}.mlp.experts{inner}", (5 * rank, width), (out, rank * 5))
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": attention,
        "target_parameters": targets,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
