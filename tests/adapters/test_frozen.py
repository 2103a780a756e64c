"""What an adapter of a QLoRA run is loaded over, what is said of it, and merging that would go half way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import finetune
from finetune.__main__ import main
from finetune.adapters.attach import attach, frozen_text, load, load_adapter, save_adapter
from finetune.adapters.files import AdapterFiles
from finetune.config.schema import QuantizeSection
from finetune.errors import AdapterError, ModelError
from finetune.quant.experts import PackedExperts
from finetune.quant.linear import is_linear_4bit
from finetune.quant.load import load_frozen, quantize_model
from finetune.routing.plan import ExpertPlan
from tests.tiny import save_as_hub, save_tokenizer, tiny_moe, token_ids
from tests.training.runs import save_moe

BOTH = {"attention": ["q_proj", "o_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 3}
NF4 = QuantizeSection(scheme="nf4", block=128)
FP32 = {"dtype": torch.float32, "device": "cpu"}


def trained(model, path, adapter=BOTH, **options):
    """An adapter of `model` with random factors, saved; and the logits of the two."""
    adapted = attach(model, adapter, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(adapted, path)
    return adapted.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_as_hub(tiny_moe(), tmp_path_factory.mktemp("hub") / "model")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def packed(base, tmp_path):
    quantize_model(base, tmp_path / "packed", NF4)
    return tmp_path / "packed"


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def is_packed(model):
    return any(isinstance(module, PackedExperts) or is_linear_4bit(module) for module in model.modules())


def test_it_runs_over_what_it_was_trained_on(base, tmp_path):
    live = trained(load_frozen(base, NF4, **FP32), tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter", **FP32)
    assert torch.equal(logits(model), logits(live))
    assert frozen_text(model) == (
        f"frozen weights: {base} in nf4 (attention and experts), decoded to float32, packed while loading"
    )
    plain, _ = load(tmp_path / "adapter", **FP32, base_weights="original")
    assert not is_packed(plain)
    assert (logits(plain) - logits(live)).abs().max() > 1e-3
    assert "as it is stored; the adapter was trained on its nf4 form" in frozen_text(plain)
    with pytest.raises(AdapterError, match="neither packed nor original"):
        load(tmp_path / "adapter", base_weights="dequantized")


def test_the_packed_folder_is_used_while_it_is_there(base, packed, tmp_path):
    live = trained(load_frozen(packed, **FP32), tmp_path / "adapter")
    assert AdapterFiles.open(tmp_path / "adapter").packed_in == str(packed)
    away = tmp_path / "away"
    shutil.copytree(base, away)
    model, _ = load(tmp_path / "adapter", **FP32)
    assert torch.equal(logits(model), logits(live))
    assert frozen_text(model).endswith(f"decoded to float32, from {packed}")
    shutil.move(packed, tmp_path / "moved")
    again, _ = load(tmp_path / "adapter", **FP32)  # packed anew
    assert torch.equal(logits(again), logits(live))
    assert frozen_text(again).endswith("packed while loading")
    moved, _ = load(tmp_path / "adapter", **FP32, base=tmp_path / "moved")
    assert frozen_text(moved).endswith(f"from {tmp_path / 'moved'}")
    assert torch.equal(logits(moved), logits(live))
    elsewhere, _ = load(tmp_path / "adapter", **FP32, base=away)
    assert torch.equal(logits(elsewhere), logits(live))


def test_a_packed_folder_that_was_made_anew_in_another_way_is_not_used(base, packed, tmp_path):
    trained(load_frozen(packed, **FP32), tmp_path / "adapter")
    shutil.rmtree(packed)
    quantize_model(base, packed, QuantizeSection(scheme="fp8"))
    model, _ = load(tmp_path / "adapter", **FP32)
    assert "nf4" in frozen_text(model)
    assert frozen_text(model).endswith("packed while loading")
    asked, _ = load(tmp_path / "adapter", **FP32, base=packed)  # somebody's choice
    assert "fp8 (experts)" in frozen_text(asked)


def test_bases_that_cannot_be_meant(base, packed, tmp_path):
    trained(load_frozen(packed, **FP32), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=f"holds no original weights\nhint: give the model it was made from, {base}"):
        load(tmp_path / "adapter", base=packed, base_weights="original")
    other = save_as_hub(tiny_moe(seed=1), tmp_path / "other")
    save_tokenizer(other)
    quantize_model(other, tmp_path / "other packed", NF4)
    for wrong in (other, tmp_path / "other packed"):
        with pytest.raises(AdapterError, match="is not the model the adapter was trained on"):
            load(tmp_path / "adapter", base=wrong)
    with pytest.raises(ModelError, match="is a model, and has no base"):
        load(base, base=packed)


def test_adapters_of_16_bit_models_have_nothing_to_tell(base, packed, tmp_path):
    live = trained(load_frozen(base, **FP32), tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter", **FP32)
    assert torch.equal(logits(model), logits(live))
    assert frozen_text(model) is None
    below, _ = load(tmp_path / "adapter", **FP32, base=packed)  # to save memory
    assert is_packed(below)
    assert f"from {packed}" in frozen_text(below)


def test_training_on_keeps_track(base, packed, tmp_path):
    trained(load_frozen(packed, **FP32), tmp_path / "adapter")
    for model, folder in ((load_frozen(packed, **FP32), str(packed)), (load_frozen(base, NF4, **FP32), None)):
        save_adapter(load_adapter(model, tmp_path / "adapter", trainable=True), tmp_path / "again")
        assert AdapterFiles.open(tmp_path / "again").packed_in == folder


def test_eval_and_chat_say_what_they_use(tmp_path, capsys):
    base, packed = save_moe(tmp_path / "moe"), tmp_path / "packed"
    quantize_model(base, packed, NF4)
    trained(load_frozen(packed, **FP32), tmp_path / "adapter")
    asked = ["eval", str(tmp_path / "adapter"), "--data", "examples/data/secret-code-heldout.jsonl", "--limit", "3"]
    asked += ["--dtype", "fp32"]
    told = {}
    for weights in ("packed", "original"):
        assert main([*asked, "--base-weights", weights, "--json"]) == 0
        told[weights] = json.loads(capsys.readouterr().out)
    assert told["packed"]["frozen"].endswith(f"from {packed}")
    assert "as it is stored" in told["original"]["frozen"]
    assert told["packed"]["total"]["loss"] != told["original"]["total"]["loss"]
    assert main([*asked, "--base", str(base)]) == 0
    assert "packed while loading" in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "--base-weights", "dequantized"]) == 2
    capsys.readouterr()
    chat = ["chat", str(tmp_path / "adapter"), "--prompt", "hello", "--max-new-tokens", "2", "--base", str(packed)]
    assert main(chat) == 0
    captured = capsys.readouterr()
    assert f"from {packed}" in captured.err
    assert "frozen weights" not in captured.out


WHOLE = ExpertPlan(num_experts=6, experts_by_layer={0: (1,), 1: (2, 5)})


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("section", "adapter", "whole"),
    [
        ({"scheme": "nf4"}, BOTH, False),
        ({"scheme": "nf4", "attention": False}, BOTH, False),
        ({"scheme": "nf4", "experts": False}, BOTH, False),
        ({"scheme": "fp8"}, BOTH, False),
        ({"scheme": "fp8"}, BOTH, True),
    ],
)
def test_merging_into_packed_weights_is_refused_before_anything_changes(
    base, tmp_path, section, adapter, whole, method
):
    options = {"experts": WHOLE, "expert_mode": "full"} if whole else {}
    live = trained(load_frozen(base, QuantizeSection(**section), **FP32), tmp_path / "adapter", adapter, **options)
    loaded, _ = load(tmp_path / "adapter", **FP32)
    for model in (live, loaded):
        want = logits(model)
        with pytest.raises(AdapterError, match=r"are packed.*nothing was changed\nhint: .*finetune merge ADAPTER"):
            getattr(model, method)()
        assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
        assert torch.equal(logits(model), want)


def test_merging_where_only_other_weights_are_packed_works(base, tmp_path):
    section = QuantizeSection(scheme="nf4", attention=False)
    live = trained(load_frozen(base, section, **FP32), tmp_path / "adapter", {"attention": ["q_proj"], "rank": 2})
    want = logits(live)
    live.merge_adapter()
    assert (logits(live) - want).abs().max() < 1e-5
    assert any(module.merged for module in live.modules() if isinstance(module, BaseTunerLayer))


def test_a_model_is_no_adapter(base, packed, tmp_path):
    for path, kind in ((base, "a model"), (packed, "a packed model")):
        with pytest.raises(AdapterError, match=f"is {kind}, not an adapter\nhint: give the adapter"):
            finetune.merge(path, tmp_path / "merged")
