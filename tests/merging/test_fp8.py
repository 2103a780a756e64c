"""Bases and outputs in the hub's FP8 block dialect."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ModelError, VerifyError
from finetune.merging.merge import merge
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint
from finetune.verification.verify import verify
from tests.checkpoints import (
    ATTENTION,
    EXPERTS,
    MOE,
    edit_json,
    edit_tensors,
    read_all,
    write_adapter,
    write_base,
)

BLOCK = (16, 8)  # 24 x 24, 16 x 24 and 32 x 24 weights: whole and cut blocks


def to_fp8(base, scale_dtype=torch.float32):
    """Stores the linear weights of a checkpoint in FP8 blocks, one shard after the other."""
    weight_map = {}
    for path in sorted(base.glob("*.safetensors")):
        tensors = {}
        for name, value in load_file(path).items():
            if name.endswith("_proj.weight"):
                tensors[name], tensors[f"{name}_scale_inv"] = fp8.quantize(value.float(), BLOCK, scale_dtype)
            else:
                tensors[name] = value
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
    edit_json(base / "config.json", quantization_config=settings)
    edit_json(base / "model.safetensors.index.json", weight_map=weight_map)
    return base


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["scales fp32", "scales bf16"])
def case(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("fp8")
    plain = write_base(folder / "plain", MOE, dtype=torch.bfloat16)
    adapter = write_adapter(folder / "adapter", plain, std=0.1, target_modules=ATTENTION, target_parameters=EXPERTS[1:])
    return adapter, to_fp8(write_base(folder / "base", MOE, dtype=torch.bfloat16), request.param)


def test_quantize_fills_the_range_and_keeps_zeros():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    weight[:16, :8] = 0
    values, scales = fp8.quantize(weight, (16, 8), torch.float32)
    back = fp8.dequantize(values, scales, (16, 8))
    assert scales.shape == (2, 4)
    assert scales[0, 0] == 1
    assert (back[:16, :8] == 0).all()
    assert (back - weight).abs().max() <= weight.abs().max() / 16
    assert values.float().abs()[:16, 8:16].max() == 448
    assert torch.equal(fp8.dequantize(values[5:], scales, (16, 8), 5), back[5:])


def test_merged_in_blocks(case, tmp_path):
    adapter, base = case
    report = merge(adapter, tmp_path / "merged", base=base)
    before, after = read_all(base), read_all(tmp_path / "merged")
    assert {name: value.dtype for name, value in before.items()} == {name: value.dtype for name, value in after.items()}
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {n for n in before if ("self_attn" in n and "norm" not in n) or "down_proj" in n}
    assert report.tensors_changed == len(changed)
    proof = verify(adapter, tmp_path / "merged", base=base)
    assert proof.logits.agrees
    assert len(proof.logits.layers) == MOE["num_hidden_layers"]
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_merged_in_16_and_32_bits(case, tmp_path, dtype):
    adapter, base = case
    merge(adapter, tmp_path / "merged", base=base, dtype=dtype)
    after = read_all(tmp_path / "merged")
    assert not any(name.endswith("_scale_inv") for name in after)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    source = Checkpoint.open(base)
    untouched = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(after[untouched], source.read_float(untouched).to(after[untouched].dtype))
    assert verify(adapter, tmp_path / "merged", base=base).logits.agrees
    from tests.checkpoints import load_plain

    load_plain(tmp_path / "merged")


def test_wrong_values_and_wrong_scales_are_named(case, tmp_path):
    adapter, base = case
    name = "model.layers.0.mlp.experts.3.down_proj.weight"

    def value(tensors):
        tensors[name] = (tensors[name].float() * 1.2).clamp(-448, 448).to(torch.float8_e4m3fn)

    def coarse(tensors):  # right to the rounding of scales that are too large
        weight = fp8.dequantize(tensors[name], tensors[f"{name}_scale_inv"], BLOCK)
        scales = tensors[f"{name}_scale_inv"] * 4
        wide = fp8.dequantize(torch.ones(weight.shape).to(torch.float8_e4m3fn), scales, BLOCK)
        tensors[name], tensors[f"{name}_scale_inv"] = (weight / wide).to(torch.float8_e4m3fn), scales

    def frozen(tensors):
        tensors["model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"] *= 2

    for change in (value, coarse, frozen):
        merged = tmp_path / change.__name__
        merge(adapter, merged, base=base)
        shard = merged / Checkpoint.open(merged).tensors[name].shard
        edit_tensors(shard, change)
        with pytest.raises(VerifyError, match=r"experts\.3\.up_proj" if change is frozen else r"experts\.3\.down_proj"):
            verify(adapter, merged, base=base, weights_only=True)


def test_scales_that_do_not_fit_are_refused(case, tmp_path):
    adapter, _ = case
    base = to_fp8(write_base(tmp_path / "base", MOE, shards=2))
    edit_json(base / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ModelError, match="per block of 128 x 128"):
        merge(adapter, tmp_path / "merged", base=base)
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match="quantized"):
        merge(adapter, tmp_path / "merged", base=base)
