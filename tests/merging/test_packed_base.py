"""Adapters trained on packed weights, merged into the original weights or into those that the run saw."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from finetune.__main__ import main
from finetune.adapters.attach import attach, load_adapter, save_adapter
from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.files import AdapterFiles
from finetune.config.schema import QuantizeSection
from finetune.errors import AdapterError, UserError, VerifyError
from finetune.merging.merge import merge
from finetune.merging.packed_base import QuantizationError
from finetune.models.checkpoint import Checkpoint
from finetune.quant.dequantized import DequantizedCheckpoint
from finetune.quant.load import load_quantized
from finetune.routing.plan import ExpertPlan
from finetune.verification.verify import verify
from tests.checkpoints import (
    ATTENTION,
    DENSE,
    EXPERTS,
    MOE,
    edit_json,
    load_plain,
    read_all,
    token_batch,
    write_adapter,
    write_base,
)
from tests.merging.test_fp8 import to_fp8

BANKS = {"attention": ["q_proj", "o_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 3}
CASES = {
    "nf4": (MOE, {"scheme": "nf4"}, BANKS),
    "nf4, scales not": (MOE, {"scheme": "nf4", "double": False, "block": 128}, BANKS),
    "experts alone": (MOE, {"scheme": "nf4", "attention": False}, BANKS),
    "attention alone": (MOE, {"scheme": "nf4", "experts": False}, BANKS),
    "fp8": (MOE, {"scheme": "fp8"}, BANKS),
    "some experts": (MOE, {"scheme": "nf4"}, {"attention": [], "experts": ["down_proj"], "rank": 2}),
    "dense": (DENSE, {"scheme": "nf4"}, {"attention": ["v_proj"], "mlp": ["down_proj"], "rank": 2}),
}


def trained(base, path, quantize, adapter, std=0.1):
    """The model of a QLoRA run, its adapter saved at `path`."""
    section = QuantizeSection(**{"compute_dtype": "float32", **quantize})
    model = attach(load_quantized(base, section, dtype=torch.float32), adapter, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    save_adapter(model, path)
    return model.eval()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    base = write_base(folder / "base", MOE)
    return base, trained(base, folder / "adapter", {"scheme": "nf4"}, BANKS), folder / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_batch()).logits


@pytest.mark.parametrize("name", CASES)
def test_dequantized_is_the_model_that_was_trained(name, tmp_path):
    config, quantize, adapter = CASES[name]
    base = write_base(tmp_path / "base", config)
    live = trained(base, tmp_path / "adapter", quantize, adapter)
    report = merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")
    want = logits(live)
    assert (logits(load_plain(tmp_path / "merged")) - want).abs().max() < 1e-5 * want.abs().max()
    verify(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")
    seen = DequantizedCheckpoint.of(Checkpoint.open(base), QuantizeSection(**quantize, compute_dtype="float32"))
    merged = Checkpoint.open(tmp_path / "merged")
    same = [w for w in seen.weights if torch.equal(merged.read(w), seen.read(w))]
    assert set(same) == set(seen.weights) - set(changed_by(tmp_path / "adapter"))
    assert report.tensors_changed == len(
        {w for w in seen.weights if seen.packs(w)} | set(changed_by(tmp_path / "adapter"))
    )
    assert report.tensors_changed + report.tensors_copied == len(seen.weights)
    with pytest.raises(VerifyError, match=r"if it was merged with onto=.dequantized."):
        verify(tmp_path / "adapter", tmp_path / "merged")


def test_whole_experts_and_routers_are_added_to_what_the_run_saw(tmp_path):
    base = write_base(tmp_path / "base", MOE)
    section = QuantizeSection(scheme="nf4", compute_dtype="float32")
    plan = ExpertPlan(num_experts=5, experts_by_layer={0: (1, 3), 1: (0,)})
    live = load_quantized(base, section, dtype=torch.float32)
    live = attach(live, {**BANKS, "attention": []}, plan, expert_mode="full", router="lora", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(live, tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")
    assert {family: seen.measured for family, seen in report.quantization.items()} == dict.fromkeys(
        ("expert down", "expert gate", "expert up"), 3
    )
    want = logits(live.eval())
    assert (logits(load_plain(tmp_path / "merged")) - want).abs().max() < 1e-5 * want.abs().max()
    verify(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")


def changed_by(adapter):
    files = AdapterFiles.open(adapter)
    return [name for name in files.tensor_map if not files.read(name).is_zero]


def test_original_is_the_default(case, tmp_path):
    base, live, adapter = case
    merge(adapter, tmp_path / "merged")
    stored, merged = read_all(base), read_all(tmp_path / "merged")
    untouched = [name for name in stored if name not in changed_by(adapter)]
    assert len(untouched) > 5
    assert all(torch.equal(stored[name], merged[name]) for name in untouched)
    assert (logits(load_plain(tmp_path / "merged")) - logits(live)).abs().max() > 1e-3
    verify(adapter, tmp_path / "merged", weights_only=True)
    with pytest.raises(VerifyError, match="differs from base"):
        verify(adapter, tmp_path / "merged", onto="dequantized", weights_only=True)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_the_report_tells_what_packing_did(case, tmp_path, onto):
    base, _, adapter = case
    report = merge(adapter, tmp_path / "merged", onto=onto)
    assert set(report.quantization) == {"attention", "expert gate", "expert up", "expert down"}
    seen = DequantizedCheckpoint.of(Checkpoint.open(base), QuantizeSection(scheme="nf4", compute_dtype="float32"))
    names = [name for name in seen.weights if name.endswith(("q_proj.weight", "o_proj.weight"))]
    pairs = [(seen.stored.read(name), seen.read(name)) for name in names]
    error = sum((b - a).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    attention = report.quantization["attention"]
    assert attention.measured == len(names) == 4
    assert attention.error == pytest.approx(float(error) ** 0.5, rel=1e-5)
    assert 0.03 < attention.error < 0.15
    assert attention.ratio == pytest.approx(attention.error / attention.delta)
    console = Console(record=True, width=140)
    console.print(report)
    assert "what packing did to the weights" in console.export_text()
    assert json.loads(json.dumps(report.to_dict()))["quantization"]["attention"]["measured"] == 4


def test_a_large_quantization_error_is_told(tmp_path):
    base = write_base(tmp_path / "base", MOE)
    trained(base, tmp_path / "adapter", {"scheme": "nf4"}, BANKS, std=1e-3)
    (told,) = (w for w in merge(tmp_path / "adapter", tmp_path / "one").warnings if "packed its base" in w)
    assert "more than the adapter does (attention" in told
    assert "--onto dequantized" in told
    report = merge(tmp_path / "adapter", tmp_path / "two", onto="dequantized")
    assert any("it is what was trained" in warning for warning in report.warnings)
    trained(base, tmp_path / "large", {"scheme": "nf4"}, BANKS, std=3.0)
    assert not any("packed its base" in warning for warning in merge(tmp_path / "large", tmp_path / "three").warnings)


def test_an_adapter_of_a_16_bit_model_has_nothing_to_dequantize(tmp_path):
    base = write_base(tmp_path / "base", MOE)
    stock = write_adapter(tmp_path / "stock", base, target_modules=ATTENTION, target_parameters=EXPERTS)
    with pytest.raises(AdapterError, match="does not say that its base was packed"):
        merge(stock, tmp_path / "merged", onto="dequantized")
    assert not (tmp_path / "merged").exists()
    report = merge(stock, tmp_path / "merged")
    assert report.quantization == {}
    assert main(["merge", str(stock), "-o", str(tmp_path / "no"), "--onto", "dequantized"]) == 2
    assert main(["merge", str(stock), "-o", str(tmp_path / "no"), "--onto", "other"]) == 2


def test_adapters_of_differently_packed_models(case, tmp_path):
    base, _, adapter = case
    trained(base, tmp_path / "fp8", {"scheme": "fp8"}, BANKS)
    with pytest.raises(AdapterError, match="packed in another way"):
        merge([adapter, tmp_path / "fp8"], tmp_path / "merged", onto="dequantized")
    assert merge([adapter, tmp_path / "fp8"], tmp_path / "merged").quantization == {}
    both = [adapter, adapter]
    merge(both, tmp_path / "both", weights=[0.5, 0.25], onto="dequantized")
    verify(both, tmp_path / "both", weights=[0.5, 0.25], onto="dequantized")


def test_settings_that_are_none_are_refused(case, tmp_path):
    shutil.copytree(case[2], tmp_path / "adapter")
    (tmp_path / "adapter/complete.json").unlink()
    edit_json(tmp_path / "adapter/finetune_adapter.json", quantize={"scheme": "int3"})
    with pytest.raises(AdapterError, match="is not a quantize section"):
        merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")


def test_a_base_in_fp8(tmp_path):
    base = to_fp8(write_base(tmp_path / "base", MOE, dtype=torch.bfloat16))
    live = trained(base, tmp_path / "adapter", {"scheme": "nf4"}, BANKS)
    with pytest.raises(UserError, match="would be rounded to the base's FP8"):
        merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")
    merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized", dtype="fp32")
    verify(tmp_path / "adapter", tmp_path / "merged", onto="dequantized")
    want = logits(live)
    assert (logits(load_plain(tmp_path / "merged")) - want).abs().max() < 1e-5 * want.abs().max()


def test_the_command(case, tmp_path, capsys):
    out, dequantized = str(tmp_path / "out"), ["--onto", "dequantized"]
    assert main(["merge", str(case[2]), "-o", out, "--json", *dequantized]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantization"]["expert up"]["error"] > 0.03
    assert told["verify"]["logits"]["top1_agreement"] == 1
    assert main(["verify", str(case[2]), out, *dequantized]) == 0
    assert main(["verify", str(case[2]), out]) == 1


def test_the_sidecar_says_how_the_base_was_packed(case, tmp_path):
    base, _, adapter = case
    told = {"scheme": "nf4", "attention": True, "experts": True, "block": 64, "double": True}
    told["compute_dtype"] = "float32"
    assert json.loads((adapter / "finetune_adapter.json").read_text())["quantize"] == told
    assert "quantize" not in json.loads((adapter / "adapter_config.json").read_text())
    assert ExpertLoraConfig.load(adapter).quantize == told
    save_adapter(load_adapter(load_plain(base), adapter), tmp_path / "used")
    assert ExpertLoraConfig.load(tmp_path / "used").quantize == told
    save_adapter(load_adapter(load_plain(base), adapter, trainable=True), tmp_path / "trained on")
    assert ExpertLoraConfig.load(tmp_path / "trained on").quantize is None
    section = QuantizeSection(scheme="fp8")
    again = load_adapter(load_quantized(base, section, dtype=torch.float32), adapter, trainable=True)
    save_adapter(again, tmp_path / "again")
    assert ExpertLoraConfig.load(tmp_path / "again").quantize["scheme"] == "fp8"


def test_ratio():
    assert QuantizationError(measured=1, error=0.5, delta=0.25).ratio == 2
