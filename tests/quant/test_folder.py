"""Packed folders: what they remember, how they are written, and who takes them."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import finetune
from finetune.adapters.attach import attach, save_adapter
from finetune.adapters.files import AdapterFiles
from finetune.config.packed_folder import read_packed_settings
from finetune.config.schema import QuantizeSection
from finetune.errors import ModelError, UserError
from finetune.models.checkpoint import Checkpoint, base_fingerprint
from finetune.models.loading import load_model, run_device
from finetune.models.skeleton import skeleton
from finetune.quant import build
from finetune.quant.experts import PackedExperts
from finetune.quant.folder import _write_shard
from finetune.quant.load import load_frozen, load_quantized, quantize_model
from finetune.quant.weight_plan import plan_weights, read_weights
from tests.merging.test_fp8 import to_fp8
from tests.tiny import save_as_hub, save_tokenizer, tiny_moe, token_ids

NF4 = QuantizeSection(scheme="nf4")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = save_as_hub(tiny_moe(), tmp_path_factory.mktemp("hub") / "model")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def packed(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    quantize_model(hub, folder, NF4)
    return folder


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Puts a folder into a hub cache as `q/tiny` at branch `old`, and nothing at `main`."""

    def put(folder):
        commit, cache = "a" * 40, tmp_path / "cache"
        shutil.copytree(folder, cache / "models--q--tiny/snapshots" / commit)
        (cache / "models--q--tiny/refs").mkdir()
        (cache / "models--q--tiny/refs/old").write_text(commit)
        for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
            monkeypatch.setattr(name, str(cache) if name.endswith("CACHE") else True)
        return {"path": "q/tiny", "revision": "old"}

    return put


def test_the_revision_of_a_hub_model_is_remembered_and_used(cached, hub, tmp_path):
    at = cached(hub)
    with pytest.raises(ModelError, match="q/tiny: is neither a folder nor in the local hub cache, and cannot be"):
        quantize_model("q/tiny", tmp_path / "packed", NF4)
    quantize_model(at["path"], tmp_path / "packed", NF4, revision="old")
    assert read_packed_settings(tmp_path / "packed").revision == "old"
    assert json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["base_revision"] == "old"
    for model in (
        load_frozen(tmp_path / "packed", device="cpu"),
        load_frozen(**at, section=NF4, device="cpu"),
        load_frozen(**at, device="cpu"),
    ):
        save_adapter(attach(model, {"attention": ["q_proj"], "rank": 2}), tmp_path / "adapter")
        files = AdapterFiles.open(tmp_path / "adapter")
        assert (files.base_model, files.config.revision) == ("q/tiny", "old")
        assert files.base_fingerprint == base_fingerprint(Checkpoint.open(hub))
        finetune.merge(tmp_path / "adapter", tmp_path / "merged")
        finetune.verify(tmp_path / "adapter", tmp_path / "merged")
        shutil.rmtree(tmp_path / "merged")


def test_a_packed_model_on_the_hub_loads(cached, packed):
    model = load_frozen(**cached(packed), device="cpu")
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    assert torch.equal(model(token_ids()).logits, load_frozen(packed, device="cpu")(token_ids()).logits)


def test_an_fp8_model_on_the_hub_loads_to_use(cached, hub, tmp_path):
    base = to_fp8(shutil.copytree(hub, tmp_path / "fp8"))
    want = load_frozen(base, device="cpu")(token_ids()).logits
    model = load_frozen(**cached(base), device="cpu")
    assert torch.equal(model(token_ids()).logits, want)
    assert getattr(model, "packed_as", None) is None


def test_its_fingerprint_is_that_of_its_base(hub, packed):
    assert base_fingerprint(Checkpoint.open(packed)) == base_fingerprint(Checkpoint.open(hub))


def test_a_folder_settles_what_is_left_open(packed):
    want = load_quantized(packed, QuantizeSection(scheme="nf4", block=64, double=True), dtype=torch.float32)
    for section in (QuantizeSection(), NF4):
        model = load_quantized(packed, section, dtype=torch.float32)
        assert torch.equal(model(token_ids()).logits, want(token_ids()).logits)
        assert model.packed_as == want.packed_as
    with pytest.raises(ModelError, match=r"quantize\.scheme: is none, but the packed model was made with nf4"):
        load_quantized(packed, QuantizeSection(scheme="none"), dtype=torch.float32)


def test_weights_are_decoded_to_the_models_type_unless_told(packed):
    found = {}
    for dtype, told in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "bfloat16")):
        model = load_quantized(packed, QuantizeSection(scheme="nf4", compute_dtype=told), dtype=dtype)
        found[dtype, told] = model.model.layers[0].mlp.experts.down_proj.dtype, model.packed_as["compute_dtype"]
    assert list(found.values()) == [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, "bfloat16"),
    ]


def test_save_pretrained_of_a_packed_model_is_refused(packed, hub, tmp_path):
    model = load_frozen(packed, device="cpu")
    with pytest.raises(UserError, match="finetune quantize"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    attach(model, {"attention": ["q_proj"], "rank": 2}).save_pretrained(tmp_path / "adapter")
    assert AdapterFiles.open(tmp_path / "adapter").base_model == str(hub)
    load_frozen(hub, device="cpu").save_pretrained(tmp_path / "plain")
    assert load_model(tmp_path / "plain", dtype=torch.float32)


def test_writing_a_shard_takes_no_second_copy(tmp_path):
    tensors = {
        "a.codes": torch.arange(2**24, dtype=torch.int64).view(torch.uint8).view(4, -1),
        "a.offset": torch.tensor(2.5),
        "a.scales": torch.rand(3, 5).to(torch.bfloat16),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "transposed": torch.rand(3, 4).T,
    }
    tracemalloc.start()
    _write_shard(tmp_path / "shard.safetensors", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < tensors["a.codes"].numel()
    read = load_file(tmp_path / "shard.safetensors")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "shard.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_not_packed_as_planned_is_an_error(hub, monkeypatch):
    plans = plan_weights(build.weight_shapes(skeleton(hub, torch.float32)), NF4, tied=False)
    linear = next(part for part in plans if part.packed and not part.is_stack)

    def load():
        model = skeleton(hub, torch.float32)
        return build.fill(model, read_weights(Checkpoint.open(hub), plans, NF4, torch.float32), NF4)

    monkeypatch.setattr(build, "_put_linear", lambda *_: None)
    with pytest.raises(ModelError, match=f"{linear.name}: was not filled"):
        load()
    plain = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    monkeypatch.setattr(build, "_put_linear", lambda model, part, *_: build._put_weight(model, part.name, plain))
    with pytest.raises(ModelError, match="4 weights are quantized, not 12"):
        load()


def test_every_loader_puts_the_model_where_it_will_run(hub, packed, monkeypatch):
    assert run_device() == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    placed = []
    monkeypatch.setattr("finetune.quant.load.run_device", lambda: "the accelerator")
    for loader in ("load_model", "load_quantized"):
        monkeypatch.setattr(f"finetune.quant.load.{loader}", lambda *_, device, **__: placed.append(device))
    for path, section in ((hub, None), (hub, NF4), (packed, None)):
        load_frozen(path, section)
    load_frozen(hub, device="meta")
    assert placed == ["the accelerator"] * 3 + ["meta"]
