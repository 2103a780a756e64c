"""Packed models: equal to a 16-bit model that holds the decoded weights, whichever way they were loaded."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from finetune.adapters.attach import attach
from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, RecipeError, RunError, UserError
from finetune.models import fp8
from finetune.models.loading import load_model
from finetune.quant import nf4
from finetune.quant.experts import Fp8Projection, PackedExperts, count_weights
from finetune.quant.linear import is_linear_4bit
from finetune.quant.load import check_source, load_quantized, quantize_model
from tests.merging.test_fp8 import to_fp8
from tests.tiny import hub_tensors, save_as_hub, save_tokenizer, tiny_dense, tiny_moe, token_ids

SCHEMES = {
    "nf4": {"scheme": "nf4"},
    "nf4, scales not": {"scheme": "nf4", "double": False, "block": 128},
    "nf4, experts only": {"scheme": "nf4", "attention": False},
    "nf4, attention only": {"scheme": "nf4", "experts": False},
    "fp8": {"scheme": "fp8"},
}
ADAPTER = {"attention": ["q_proj", "o_proj"], "experts": ["gate_up_proj", "down_proj"], "rank": 3}


def section(name: str = "nf4", **more) -> QuantizeSection:
    return QuantizeSection(**{"compute_dtype": "float32", **SCHEMES[name], **more})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return save_as_hub(tiny_moe(), tmp_path_factory.mktemp("hub") / "model", shards=3)


def load(path, settings=None, dtype=torch.float32):
    return load_quantized(path, settings or section(), dtype=dtype)


def decoded(model, settings):
    """`model` with every weight that `settings` packs replaced by what its packed form decodes to."""
    for name, weight in model.state_dict().items():
        if "mlp.experts." in name and settings.experts:
            for matrix in (matrix for expert in weight for matrix in expert.chunk(2 if "gate_up" in name else 1)):
                if settings.scheme == "fp8":
                    matrix.copy_(fp8.dequantize(*fp8.quantize(matrix, (128, 128), torch.float32), (128, 128)))
            if settings.scheme == "nf4":
                for expert in weight:
                    expert.copy_(nf4_decoded(expert, settings))
        elif "self_attn" in name and "norm" not in name and settings.packs_attention:
            weight.copy_(nf4_decoded(weight, settings))
    return model


def nf4_decoded(weight, settings):
    return nf4.decode(nf4.quantize(weight, block=settings.block_size, double=settings.double), torch.float32)


def with_gradients(model):
    """Logits, and the gradient of every adapter parameter by name."""
    ids = token_ids()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_and_gradients_are_those_of_the_decoded_weights(hub, name, backend):
    models = [decoded(tiny_moe(), section(name)), load(hub, section(name))]
    adapted = [attach(model, ADAPTER, seed=0) for model in models]
    for model in adapted:
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        for module in model.modules():
            if hasattr(module, "recompute"):
                module.backend = backend
    (want, want_grads), (got, got_grads) = (with_gradients(model) for model in adapted)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert set(got_grads) == set(want_grads)
    for parameter_name, grad in want_grads.items():
        assert (got_grads[parameter_name] - grad).abs().max() <= 1e-5 * max(1.0, float(grad.abs().max()))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_packed_is_what_was_asked_for(hub, name):
    model, settings = load(hub, section(name)), section(name)
    banks = sum(isinstance(module, PackedExperts) for module in model.modules())
    linears = sum(is_linear_4bit(module) for module in model.modules())
    assert (banks, linears) == (2 * settings.experts, 8 * settings.packs_attention)
    assert count_weights(model) == count_weights(tiny_moe())
    for parameter_name, parameter in model.named_parameters():
        assert not parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", SCHEMES)
def test_a_packed_folder_loads_to_the_same_bits(hub, tmp_path, name):
    quantize_model(hub, tmp_path / "packed", section(name))
    ids = token_ids()
    want = load(hub, section(name), torch.bfloat16)(ids).logits
    for resident in ("all", "mmap"):
        model = load(tmp_path / "packed", section(name, resident=resident), torch.bfloat16)
        assert torch.equal(model(ids).logits, want)
        assert model.name_or_path == str(hub)
    on_disk = sum(buffer.numel() for n, buffer in model.named_buffers() if n.endswith("codes"))
    assert on_disk == 0


def test_an_fp8_checkpoint_keeps_its_values_and_scales(hub, tmp_path):
    base = tmp_path / "fp8"
    shutil.copytree(hub, base)
    tensors = hub_tensors(tiny_moe())
    stored = {}
    for name, weight in tensors.items():
        stored[name] = weight
        if "proj.weight" in name:
            stored[name], stored[f"{name}_scale_inv"] = fp8.quantize(weight, (128, 128), torch.float32)
    for old in base.glob("*.safetensors*"):
        old.unlink()
    save_file(stored, base / "model.safetensors")
    config = (base / "config.json").read_text().rstrip()[:-1]
    quantization = '"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}'
    (base / "config.json").write_text(f"{config}, {quantization}}}")
    model = load(base, section("fp8"))
    bank = model.model.layers[1].mlp.experts
    assert isinstance(bank.gate_up_proj, Fp8Projection)
    hub_name = "model.layers.1.mlp.experts.4.up_proj.weight"
    values = stored[hub_name].float() * stored[f"{hub_name}_scale_inv"]
    assert torch.equal(bank.gate_up_proj.weights_of((4,), torch.float32)[0, 24:], values)
    q_name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(q_name), stored[q_name].float() * stored[f"{q_name}_scale_inv"])
    assert load(base)(token_ids()).logits.isfinite().all()
    save_tokenizer(base)
    plain, _ = finetune.load(base, torch.float32)  # multiplied out
    assert torch.equal(plain.model.layers[1].mlp.experts.gate_up_proj[4, 24:], values)


def test_a_dense_model_packs_its_linear_layers(tmp_path):
    base = save_as_hub(tiny_dense(tie_word_embeddings=True), tmp_path / "dense", shards=1)
    model = load(base)
    assert sum(is_linear_4bit(module) for module in model.modules()) == 2 * 7
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ModelError, match="packs nothing"):
        load(base, section("fp8"))


def damaged(hub, tmp_path, change):
    """A copy of `hub` in one shard whose tensors `change` has altered."""
    base = save_as_hub(tiny_moe(), tmp_path / "damaged", shards=1)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")
    return base


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
SCALES = f"{EXPERT}_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"{EXPERT}: is missing"),
        (lambda t: t.update({EXPERT: t[EXPERT].int()}), f"{EXPERT}: is of a type that is no weight"),
        (lambda t: t.update({EXPERT: t[EXPERT][:3].clone()}), f"{EXPERT}: should have the shape"),
        (lambda t: t.update({EXPERT.replace(".2.", ".6."): t[EXPERT].clone()}), r"experts.6.up_proj.*: has no place"),
        (lambda t: t[EXPERT][2, 3:].fill_(float("nan")), f"damaged: {EXPERT}: holds NaN or infinity"),
        (lambda t: t[ROUTER][1, 2:3].fill_(float("inf")), f"damaged: {ROUTER}: holds NaN or infinity"),
        (lambda t: t[QUERY][1, 2:3].fill_(-float("inf")), f"damaged: {QUERY}: holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_a_damaged_checkpoint_is_named_and_leaves_nothing(hub, tmp_path, change, message, scheme):
    base = damaged(hub, tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load(base, section(scheme))
    with pytest.raises(ModelError, match=message):
        quantize_model(base, tmp_path / "out", section(scheme))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[EXPERT].view(torch.uint8)[3, 4:5].fill_(0xFF), f"fp8: {EXPERT}: holds NaN or infinity"),
        (lambda t: t[SCALES].fill_(float("inf")), f"fp8: {EXPERT}: holds NaN or infinity"),
        (lambda t: t.update({SCALES: t[SCALES].int()}), f"fp8: {SCALES}: is of a type that is no scale"),
        (lambda t: t.update({SCALES: torch.ones(1, 3)}), f"{EXPERT}: is FP8 without one _scale_inv per block"),
        (lambda t: t.pop(SCALES), f"{EXPERT}: is FP8 without one _scale_inv per block"),
        (lambda t: t.update({EXPERT: t[EXPERT].float()}), f"{SCALES}: has no place in the model"),
    ],
)
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_a_damaged_fp8_checkpoint_is_named(tmp_path, change, message, scheme):
    base = to_fp8(save_as_hub(tiny_moe(), tmp_path / "fp8"))
    shard = next(path for path in base.glob("*.safetensors") if EXPERT in load_file(path))
    tensors = load_file(shard)
    assert SCALES in tensors
    change(tensors)
    save_file(tensors, shard)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != shard.name or n in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        quantize_model(base, tmp_path / "out", section(scheme))
    assert not (tmp_path / "out").exists()


def test_fp8_weights_without_a_word_in_the_config_are_refused(tmp_path):
    base = to_fp8(save_as_hub(tiny_moe(), tmp_path / "fp8"))
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    for scheme in ("nf4", "fp8"):
        with pytest.raises(ModelError, match=r"quantization_config: is missing, but model.* is FP8 with scales"):
            load(base, section(scheme))


def test_a_truncated_shard_is_refused(hub, tmp_path):
    base = tmp_path / "cut"
    shutil.copytree(hub, base)
    shard = base / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="past the end of the file"):
        load(base)


def test_a_packed_model_on_the_hub_is_known_when_it_is_here(hub, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    quantize_model(hub, packed, section())
    check_source("owner/packed", section(resident="mmap"))
    monkeypatch.setattr("finetune.quant.load.find_checkpoint", lambda path, *_, **__: packed)
    assert load("owner/packed", section(resident="mmap")).model.layers[0].mlp.experts.down_proj.codes is None
    monkeypatch.setattr("finetune.quant.load.find_checkpoint", lambda path, *_, **__: Path(hub))
    with pytest.raises(ModelError, match=r"is mmap, but model\.path is not a packed model"):
        load("owner/plain", section(resident="mmap"))


def test_more_experts_per_token_than_there_are_are_refused(hub, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 99}))
    with pytest.raises(ModelError, match="num_experts_per_tok: asks for more experts than there are"):
        quantize_model(tmp_path / "hub", tmp_path / "packed", section())
    assert not (tmp_path / "packed").exists()


def test_packed_folders_are_checked(hub, tmp_path):
    packed = tmp_path / "packed"
    assert quantize_model(hub, packed, section()) == 2 * 2 + 2 * 4
    with pytest.raises(UserError, match="exists and is not empty"):
        quantize_model(hub, packed, section())
    with pytest.raises(UserError, match="is packed already"):
        quantize_model(packed, tmp_path / "again", section())
    with pytest.raises(ModelError, match=r"quantize\.block: is 128, but the packed model was made with 64"):
        load(packed, section(block=128))
    with pytest.raises(ModelError, match=r"give DIR as model\.path"):
        load(hub, section(resident="mmap"))
    with pytest.raises(ModelError, match="stored quantized"):
        load_model(packed, dtype=torch.float32)
    shard = next(packed.glob("*layer-001*"))
    tensors = load_file(shard)
    name = "model.layers.1.mlp.experts.down_proj.codes"
    save_file({n: t[:3].clone() if n == name else t for n, t in tensors.items()}, shard)
    with pytest.raises(ModelError, match="bytes instead of"):
        load(packed)
    (packed / "complete.json").unlink()
    with pytest.raises(ModelError, match=f"{name}: should be"):
        load(packed)


def test_load_takes_packed_folders_too(hub, tmp_path):
    quantize_model(hub, tmp_path / "packed", section())
    save_tokenizer(tmp_path / "packed")
    model, _ = finetune.load(tmp_path / "packed", torch.float32)
    assert torch.equal(model(token_ids()).logits, load(hub)(token_ids()).logits)


KILLED = """
import os, signal, sys
from finetune.config.schema import QuantizeSection
from finetune.quant.load import quantize_model
calls = 0
def progress(*_):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
quantize_model(sys.argv[1], sys.argv[2], QuantizeSection(scheme="nf4"), progress=progress)
"""


@pytest.mark.parametrize("moment", [1, 7, 23])
def test_a_killed_quantize_leaves_nothing_that_loads(hub, tmp_path, moment):
    packed = tmp_path / "packed"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(hub), str(packed), str(moment)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not packed.exists()
    quantize_model(hub, packed, section())
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert torch.equal(load(packed)(token_ids()).logits, load(hub)(token_ids()).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "is none, which packs nothing"),
        ({"scheme": "nf5"}, r"quantize\.scheme"),
        ({"scheme": "fp8", "attention": True}, "fp8 packs experts alone"),
        ({"scheme": "fp8", "block": 64}, "blocks of fp8 are 128"),
        ({"scheme": "nf4", "attention": False, "experts": False}, "neither attention nor experts"),
        ({"scheme": "nf4", "exprts": False}, "did you mean"),
    ],
)
def test_settings_are_checked_as_a_recipes_are(hub, tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message):
        finetune.quantize(hub, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_model_folder_is_never_written_to_and_an_adapter_is_no_model(hub, tmp_path):
    with pytest.raises(UserError, match="in the folder of the model"):
        quantize_model(hub, hub / "packed", section())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter"):
        quantize_model(tmp_path, tmp_path.parent / "out", section())


def test_experts_on_disk_close_their_files_and_notice_changes(hub, tmp_path):
    packed = tmp_path / "packed"
    quantize_model(hub, packed, section())

    def descriptors():
        return [link for link in Path("/proc/self/fd").iterdir() if str(packed) in os.path.realpath(link)]

    model = load(packed, section(resident="mmap"))
    assert len(descriptors()) == 2
    shard = next(packed.glob("*layer-001*"))
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(RunError, match="has changed since"):
        model(token_ids())
    del model
    gc.collect()
    assert not descriptors()


def test_an_unpacked_weight_of_a_strange_type_is_refused(hub, tmp_path):
    packed = tmp_path / "packed"
    quantize_model(hub, packed, section())
    shard = next(packed.glob("*layer-000*"))
    name = "model.layers.0.mlp.gate.weight"
    save_file({n: t.int() if n == name else t for n, t in load_file(shard).items()}, shard)
    (packed / "complete.json").unlink()
    with pytest.raises(ModelError, match=f"{name}: should be"):
        load(packed)


def test_moving_to_another_type_keeps_the_scales(hub):
    model = load(hub)
    before = model.model.layers[0].mlp.experts.down_proj.weights_of((0,), torch.float32)
    model.to(torch.bfloat16)
    after = model.model.layers[0].mlp.experts.down_proj.weights_of((0,), torch.float32)
    assert torch.equal(before, after)
