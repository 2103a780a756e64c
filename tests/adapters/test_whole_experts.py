"""Experts that train whole: compact, exact, saved and loaded, and refused by who cannot hold them."""

import json

import pytest
import torch
from peft import PeftModel

from finetune.adapters.attach import attach, check_same_plan, load_adapter, save_adapter
from finetune.adapters.files import AdapterFiles
from finetune.adapters.trainable import check_gradients, trainable_groups
from finetune.errors import AdapterError, TrainingError
from finetune.models.live import expert_modules
from finetune.routing.plan import ExpertPlan
from tests.adapters.models import BOTH, SOME, logits, tensors_of
from tests.tiny import tiny_moe, token_ids

SECTION = {"attention": ("q_proj",), "experts": BOTH, "rank": 2}


def whole(plan=SOME, dtype=torch.float32, **section):
    return attach(tiny_moe(dtype=dtype), {**SECTION, **section}, plan, seed=0, expert_mode="full")


def moved(model, std=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=std)
    return model.eval()


def test_only_the_chosen_experts_have_parameters():
    model = whole()
    shapes = {name.split("layers.")[1]: tuple(p.shape) for name, p in tensors_of(model, "lora_delta").items()}
    assert shapes == {
        "0.mlp.experts.base_layer.lora_delta.default.weight": (2, 48, 32),
        "0.mlp.experts.lora_delta.default.weight": (2, 32, 24),
        "1.mlp.experts.base_layer.lora_delta.default.weight": (3, 48, 32),
        "1.mlp.experts.lora_delta.default.weight": (3, 32, 24),
    }
    assert {name: p.requires_grad for name, p in model.named_parameters() if p.requires_grad}.keys() == set(
        tensors_of(model)
    )
    rows = {group.name: (group.matched, group.parameters) for group in trainable_groups(model)}
    assert rows["experts.gate_up_proj"] == (5, 5 * 48 * 32)
    assert rows["experts.down_proj"] == (5, 5 * 32 * 24)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_nothing_changes_at_the_start(dtype, tolerance):
    """Close, not equal: experts are put together in other blocks, and some processors round those differently."""
    want = logits(attach(tiny_moe(dtype=dtype), SECTION, SOME, seed=0))
    assert (logits(whole(dtype=dtype)) - want).abs().max() < tolerance * want.abs().max()


def test_gradients_are_those_of_the_weights_themselves():
    model, plain = whole(), tiny_moe()
    for one in (model, plain):
        one(token_ids(), labels=token_ids()).loss.backward()
    check_gradients(model)
    for layer, bank in enumerate(expert_modules(plain).values()):
        experts = list(SOME.experts_by_layer[layer])
        host = model.get_base_model().model.layers[layer].mlp.experts
        for level, name in ((host, "down_proj"), (host.base_layer, "gate_up_proj")):
            ours, stock = level.lora_delta["default"].weight.grad, bank.get_parameter(name).grad[experts]
            assert torch.allclose(ours, stock, rtol=1e-3, atol=1e-6)


def test_no_gradient_is_told():
    model = whole()
    model(token_ids(), labels=token_ids()).loss.backward()
    for tensor in tensors_of(model, "lora_delta").values():
        tensor.grad.zero_()
    with pytest.raises(TrainingError, match=r"experts\.down_proj"):
        check_gradients(model)


def test_disabled_merged_and_loaded(tmp_path):
    model = moved(whole())
    adapted, base = logits(model), logits(tiny_moe())
    assert (adapted - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.allclose(logits(model), base, atol=1e-5)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_moe(), tmp_path / "adapter", trainable=True).eval()
    assert torch.equal(logits(again), adapted)
    check_same_plan(again, tmp_path / "adapter")
    frozen = [bank.down_proj.clone() for bank in expert_modules(model).values()]
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), adapted, atol=1e-5)
    for layer, bank in enumerate(expert_modules(merged).values()):
        changed = [e for e in range(6) if not torch.equal(bank.down_proj[e], frozen[layer][e])]
        assert changed == list(SOME.experts_by_layer[layer])


@pytest.mark.parametrize("experts", [("gate_up_proj",), ("down_proj",), BOTH], ids="+".join)
def test_files_read_what_was_saved(tmp_path, experts):
    model = moved(whole(experts=experts, attention=()))
    save_adapter(model, tmp_path / "adapter")
    files = AdapterFiles.open(tmp_path / "adapter")
    assert files.num_experts == {"model.layers.0.mlp.experts": 6, "model.layers.1.mlp.experts": 6}
    host = model.get_base_model().model.layers[1].mlp.experts
    down = files.tensor_map.get("model.layers.1.mlp.experts.3.down_proj.weight")
    assert (down is not None) == ("down_proj" in experts)
    if down is not None:
        change = files.read("model.layers.1.mlp.experts.3.down_proj.weight")
        assert torch.equal(change.delta, host.lora_delta["default"].weight[2])
    if "gate_up_proj" in experts:
        gate_up = (host.base_layer if len(experts) == 2 else host).lora_delta["default"].weight[1]
        change = files.read("model.layers.1.mlp.experts.2.up_proj.weight")
        assert torch.equal(change.delta, gate_up[24:])
    assert torch.equal(logits(load_adapter(tiny_moe(), tmp_path / "adapter")), logits(model))


def test_two_adapters_add_up():
    model = moved(whole())
    other = whole(ExpertPlan({0: (1, 5), 1: (0,)}, 6)).peft_config["default"]
    model.add_adapter("other", other)
    moved(model, std=0.02)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert torch.allclose(logits(model.merge_and_unload(adapter_names=["default", "other"])), both, atol=1e-4)


def test_stock_peft_refuses_the_folder(tmp_path):
    save_adapter(whole(), tmp_path / "adapter")
    with pytest.raises(KeyError, match="FINETUNE_EXPERT_WEIGHTS"):
        PeftModel.from_pretrained(tiny_moe(), tmp_path / "adapter")


def test_damaged_files_are_told(tmp_path):
    save_adapter(whole(), tmp_path / "adapter")
    sidecar = tmp_path / "adapter" / "finetune_adapter.json"
    content = json.loads(sidecar.read_text())
    sidecar.unlink()
    (tmp_path / "adapter" / "complete.json").unlink()
    with pytest.raises(AdapterError, match="the sidecar does not say which"):
        AdapterFiles.open(tmp_path / "adapter")
    for change, match in (
        ({"experts_by_layer": {"0": [1], "1": [0, 2, 3]}}, "one matrix for each of 1 experts"),
        ({"experts_by_layer": {"0": [1, 4]}}, "a layer that is not in the plan"),
        ({"experts_by_layer": {"0": [1, 4], "1": [0, 2, 3], "2": [0]}}, "is missing"),
    ):
        sidecar.write_text(json.dumps({**content, "experts": {"num_experts": 6, **change}}))
        with pytest.raises(AdapterError, match=match):
            AdapterFiles.open(tmp_path / "adapter")


def test_a_plan_is_needed_and_another_one_is_noticed(tmp_path):
    with pytest.raises(AdapterError, match="there is no plan"):
        whole(None)
    with pytest.raises(AdapterError, match="have no factors"):
        whole(ExpertPlan({0: (1, 5)}, 6, {0: (2, 3)}))
    save_adapter(whole(), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="trained experts"):
        check_same_plan(whole(ExpertPlan({0: (1, 5), 1: (0, 2, 3)}, 6)), tmp_path / "adapter")
