import io
import json

import pytest
import torch
from rich.console import Console

from finetune.errors import AdapterError, ModelError, UserError
from finetune.io.folder import with_dtype
from finetune.merging.merge import merge
from finetune.verification.verify import verify
from tests.checkpoints import (
    ATTENTION,
    DENSE,
    EXPERTS,
    MOE,
    edit_json,
    edit_tensors,
    names_like,
    plain_logits,
    read_all,
    stock_logits,
    write_adapter,
    write_base,
)

SQUARE = {**MOE, "moe_intermediate_size": 24}
MIXED = {**MOE, "num_hidden_layers": 3, "mlp_only_layers": [1], "tie_word_embeddings": True}
ADAPTERS = {
    "attention and experts": (MOE, {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "H equals I": (SQUARE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts only": (MOE, {"target_modules": [], "target_parameters": EXPERTS}),
    "gate_up only": (MOE, {"target_modules": [], "target_parameters": EXPERTS[:1]}),
    "down only": (MOE, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "H equals I, down only": (SQUARE, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "attention only": (MOE, {"target_modules": ATTENTION}),
    "rslora": (MOE, {"target_modules": ["o_proj"], "target_parameters": EXPERTS, "use_rslora": True}),
    "patterns": (
        MOE,
        {
            "target_modules": ATTENTION,
            "target_parameters": EXPERTS,
            "rank_pattern": {"q_proj": 2, r"mlp\.experts\.gate_up_proj": 3, r"layers\.1\.self_attn\.v_proj": 7},
            "alpha_pattern": {r"mlp\.experts\.down_proj": 4, "k_proj": 1},
        },
    ),
    "one layer": (MOE, {"target_modules": [], "target_parameters": [f"model.layers.1.{name}" for name in EXPERTS]}),
    "other parameter per layer": (
        MOE,
        {
            "target_modules": [],
            "target_parameters": ["layers.0.mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "dense layer in MoE, tied": (MIXED, {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    "all-linear, with the router": (MOE, {"target_modules": "all-linear"}),
    "dense": (DENSE, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "some layers": (DENSE, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "by expression": (DENSE, {"target_modules": r".*layers\.0\..*(q|down)_proj"}),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("moe") / "base", MOE, shards=3)


@pytest.fixture(scope="module")
def moe_bf16(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("moe16") / "base", MOE, dtype=torch.bfloat16, shards=3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, moe):
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    return write_adapter(path, moe, target_modules=ATTENTION, target_parameters=EXPERTS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_stock_peft(name, tmp_path):
    config, settings = ADAPTERS[name]
    base = write_base(tmp_path / "base", config)
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    report = merge(adapter, tmp_path / "merged")
    wanted, found = stock_logits(base, adapter), plain_logits(tmp_path / "merged")
    assert (wanted - plain_logits(base)).abs().max() > 1e-2  # the adapter does something
    assert (wanted - found).abs().max() <= 1e-4
    assert report.tensors_changed == sum(kept.tensors for kept in report.retention.values()) > 0
    assert report.tensors_changed + report.tensors_copied == len(read_all(base))
    proof = verify(adapter, tmp_path / "merged").logits
    assert proof.max_difference <= 1e-4
    assert len(proof.layers) == config["num_hidden_layers"]


def test_files_are_the_bases(moe, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")
    base, merged = _files(moe), _weights_and_sides(tmp_path / "merged")
    assert base.keys() == merged.keys()
    different = {name for name in base if base[name] != merged[name]}
    assert different == {name for name in base if name.endswith(".safetensors")}
    for name in different:  # same header: same keys in the same order, offsets, dtypes, metadata
        length = 8 + int.from_bytes(base[name][:8], "little")
        assert base[name][:length] == merged[name][:length]


def test_tensors_without_delta_are_identical(moe, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", moe, target_modules=["q_proj"])
    merge(adapter, tmp_path / "merged")
    base, merged = read_all(moe), read_all(tmp_path / "merged")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == set(names_like(r"q_proj\.weight", base))


def test_frozen_experts_keep_their_bits(moe, tmp_path):
    """A zero B, as a frozen expert has, leaves the tensor alone: also a -0.0 in it."""
    base = write_base(tmp_path / "base", MOE, shards=1)
    frozen = "model.layers.0.mlp.experts.3.up_proj.weight"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors[frozen].fill_(-0.0))
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=[], target_parameters=EXPERTS)

    def freeze(tensors):
        (name,) = names_like(r"layers\.0\.mlp\.experts\.base_layer\.lora_B", tensors)
        tensors[name].view(-1, 5, 5)[:, :, 3] = 0  # (out, R, E): expert fastest

    edit_tensors(adapter / "adapter_model.safetensors", freeze)
    report = merge(adapter, tmp_path / "merged")
    merged = read_all(tmp_path / "merged")
    assert torch.signbit(merged[frozen]).all()
    before = read_all(base)
    same = [name for name in names_like("experts", before) if torch.equal(before[name], merged[name])]
    assert same == ["model.layers.0.mlp.experts.3.gate_proj.weight", frozen]
    assert report.tensors_changed == 2 * 5 * 3 - 2


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp32"])
def test_dtypes(stored, dtype, tmp_path):
    base = write_base(tmp_path / "base", MOE, dtype=stored)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    report = merge(adapter, tmp_path / "merged", dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: stored}[dtype]
    before, factors, merged = read_all(base), read_all(adapter), read_all(tmp_path / "merged")
    assert before.keys() == merged.keys()
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            delta = factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double() * 3
            exact = (weight.double() + delta).to(wanted)
            assert torch.allclose(merged[name].float(), exact.float(), rtol=2**-7, atol=1e-6)
            assert (merged[name] == exact).float().mean() > (0.99 if wanted != torch.float32 else 0.2)
        else:
            assert torch.equal(merged[name], weight.to(wanted))
        assert merged[name].dtype == wanted
    assert bool(report.tensors_converted) == (wanted != stored)
    assert any("converted" in warning for warning in report.warnings) == (wanted != stored)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["torch_dtype"] == str(wanted).removeprefix("torch.")
    assert config == {**json.loads((base / "config.json").read_text()), "torch_dtype": config["torch_dtype"]}
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in merged.values())


def test_fp32_merge_of_bf16_base_equals_adapter_on(moe_bf16, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", moe_bf16, target_modules=ATTENTION, target_parameters=EXPERTS)
    merge(adapter, tmp_path / "merged", dtype="fp32")
    difference = stock_logits(moe_bf16, adapter) - plain_logits(tmp_path / "merged")
    assert difference.abs().max() <= 1e-4


def test_mixed_dtypes_keep_each_tensors_own(tmp_path):
    """Norms in float32 beside bf16 weights; converting re-lays the shard out without misaligning it."""
    base = write_base(tmp_path / "base", MOE, dtype=torch.bfloat16, shards=1)

    def widen(tensors):
        for name in names_like("norm", tensors):
            tensors[name] = tensors[name].float()
        tensors["model.counter"] = torch.arange(3, dtype=torch.int64)

    edit_tensors(base / "model.safetensors", widen)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(adapter, tmp_path / "kept")
    merge(adapter, tmp_path / "half", dtype="fp16")
    before, kept, half = read_all(base), read_all(tmp_path / "kept"), read_all(tmp_path / "half")
    assert {name: value.dtype for name, value in kept.items()} == {name: value.dtype for name, value in before.items()}
    assert torch.equal(half["model.counter"], before["model.counter"])
    assert {value.dtype for name, value in half.items() if name != "model.counter"} == {torch.float16}
    for name in names_like("norm", before):
        assert torch.equal(half[name], before[name].half())


def test_retention_is_the_direct_computation(moe_bf16, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", moe_bf16, std=0.02, target_modules=["q_proj"])
    kept = merge(adapter, tmp_path / "merged").retention["attention"]
    before, factors, merged = read_all(moe_bf16), read_all(adapter), read_all(tmp_path / "merged")
    wanted, realised = [], []
    for name in names_like(r"q_proj\.weight", before):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        wanted.append((3 * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()).flatten())
        realised.append((merged[name].double() - before[name].double()).flatten())
    w, r = torch.cat(wanted), torch.cat(realised)
    assert kept.tensors == 2
    assert kept.ratio == pytest.approx((r @ w / (w @ w)).item(), rel=1e-4)
    assert kept.cosine == pytest.approx((r @ w / (r.norm() * w.norm())).item(), rel=1e-4)
    assert kept.unchanged_share == pytest.approx((r == 0).double().mean().item())


def test_a_delta_that_bf16_eats_is_warned_about(moe_bf16, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", moe_bf16, std=0.004, target_modules=["q_proj"])
    report = merge(adapter, tmp_path / "merged")
    assert report.retention["attention"].is_low
    assert report.retention["attention"].unchanged_share > 0.5
    assert any("--dtype fp32" in warning for warning in report.warnings)
    fine = merge(adapter, tmp_path / "fine", dtype="fp32")
    assert fine.retention["attention"].ratio == pytest.approx(1, abs=1e-3)
    assert not any("rounding" in warning for warning in fine.warnings)


def test_zero_adapter_copies_and_says_so(moe, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", moe, std=0.0, target_modules=["q_proj"])
    report = merge(adapter, tmp_path / "merged")
    assert report.tensors_changed == 0
    assert report.retention == {}
    assert any("zero" in warning for warning in report.warnings)
    assert _files(moe) == _weights_and_sides(tmp_path / "merged")


def test_merging_twice_gives_the_same_bytes(moe_bf16, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", moe_bf16, target_modules=ATTENTION, target_parameters=EXPERTS)
    merge(adapter, tmp_path / "one")
    merge(adapter, tmp_path / "two")
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_single_file_base(tmp_path):
    base = write_base(tmp_path / "base", DENSE, shards=1)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["gate_proj"])
    merge(adapter, tmp_path / "merged")
    assert _files(base).keys() == _weights_and_sides(tmp_path / "merged").keys()


def test_hub_cache_links_and_pickles(moe, adapter, tmp_path):
    """A snapshot of links into blobs is a base; pickles, subfolders and leftovers are not copied."""
    snapshot, blobs = tmp_path / "hub/models--q--tiny/snapshots/abc", tmp_path / "hub/models--q--tiny/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(moe.iterdir())):
        (blobs / f"{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for name in ("training_args.bin", "optimizer.pt", "x.safetensors.lock"):
        (snapshot / name).write_bytes(b"x")
    (snapshot / "original").mkdir()
    merge(adapter, tmp_path / "merged", base=snapshot)
    merged = tmp_path / "merged"
    assert _weights_and_sides(merged).keys() == _files(moe).keys()
    assert not any(path.is_symlink() for path in merged.iterdir())


def test_progress_reaches_the_end(moe, adapter, tmp_path):
    seen = []
    merge(adapter, tmp_path / "merged", progress=lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] == sum(value.nbytes for value in read_all(moe).values())
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)


def test_report_is_complete(moe, adapter, tmp_path):
    report = merge(adapter, tmp_path / "merged")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["output"] == str(tmp_path / "merged")
    assert told["bytes_written"] == sum(len(data) for data in _files(tmp_path / "merged").values())
    assert set(told["retention"]) == {"attention", "expert gate", "expert up", "expert down"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "expert gate" in text
    assert f"{report.bytes_written / 1024:.2f} KiB" in text.replace("\n", " ")
    assert str(tmp_path / "merged") in text.replace("\n", "")


class TestOutput:
    def test_taken(self, adapter, tmp_path):
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged/notes.txt").write_text("mine")
        with pytest.raises(UserError, match="not empty"):
            merge(adapter, tmp_path / "merged")
        assert (tmp_path / "merged/notes.txt").read_text() == "mine"

    def test_empty_folder_is_free(self, adapter, tmp_path):
        (tmp_path / "merged").mkdir()
        merge(adapter, tmp_path / "merged")
        assert (tmp_path / "merged/config.json").is_file()

    def test_symlink(self, adapter, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "merged").symlink_to(tmp_path / "real")
        with pytest.raises(UserError, match="symlink"):
            merge(adapter, tmp_path / "merged")
        assert not any((tmp_path / "real").iterdir())

    def test_file(self, adapter, tmp_path):
        (tmp_path / "merged").write_text("a file")
        with pytest.raises(UserError, match="not a folder"):
            merge(adapter, tmp_path / "merged")

    @pytest.mark.parametrize("place", ["", "merged", "a/b"])
    def test_base_itself_or_inside(self, moe, adapter, place):
        before = _files(moe)
        with pytest.raises(UserError, match=r"not empty|base model's folder"):
            merge(adapter, moe / place)
        assert _files(moe) == before
        assert not [path for path in moe.iterdir() if path.is_dir()]

    def test_full_disk(self, adapter, tmp_path, monkeypatch):
        import shutil
        from types import SimpleNamespace

        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26 + 1000))
        with pytest.raises(UserError, match=r"needs 64\.\d+ MiB on this disk, where 64\.00 MiB are free"):
            merge(adapter, tmp_path / "merged")
        assert not list(tmp_path.iterdir())

    def test_failure_leaves_nothing(self, adapter, tmp_path):
        def stop(shard, done, total):
            if done > total / 2:
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            merge(adapter, tmp_path / "merged", progress=stop)
        assert not list(tmp_path.iterdir())

    def test_unknown_dtype(self, adapter, tmp_path):
        with pytest.raises(UserError, match="bf16, fp16, fp32"):
            merge(adapter, tmp_path / "merged", dtype="int8")


def test_overflow_in_half_precision_is_an_error(tmp_path):
    base = write_base(tmp_path / "base", MOE, shards=1)
    edit_tensors(base / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*not finite as float16"):
        merge(adapter, tmp_path / "merged", dtype="fp16")
    assert not (tmp_path / "merged").exists()


def test_nan_in_a_changed_base_tensor_is_an_error(tmp_path):
    base = write_base(tmp_path / "base", MOE, shards=1)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(ModelError, match="not finite"):
        merge(adapter, tmp_path / "merged")


def test_pieces_cover_large_and_odd_tensors(moe, tmp_path, monkeypatch):
    """Pieces of a few elements give the same result as whole tensors."""
    adapter = write_adapter(tmp_path / "adapter", moe, target_modules=ATTENTION, target_parameters=EXPERTS)
    merge(adapter, tmp_path / "whole", dtype="bf16")
    monkeypatch.setattr("finetune.io.pieces.PIECE_ELEMENTS", 100)
    monkeypatch.setattr("finetune.io.pieces.COPY_BYTES", 60)
    merge(adapter, tmp_path / "pieces", dtype="bf16")
    assert _files(tmp_path / "whole") == _files(tmp_path / "pieces")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"torch_dtype":"bfloat16",\n "x": 1}', b'{"torch_dtype":"float32",\n "x": 1}'),
        (b'{"dtype" : "bfloat16"}', b'{"dtype" : "float32"}'),
        (b'{"a": {"dtype": "bfloat16"}, "dtype": null}', b'{"a": {"dtype": "bfloat16"}, "dtype": "float32"}'),
        (b'{"dtype": "float16", "torch_dtype": "float16"}', b'{"dtype": "float32", "torch_dtype": "float32"}'),
        (b'{"a": "\\"dtype\\": \\"x\\""}', b'{"a": "\\"dtype\\": \\"x\\""}'),
        (b'{"dtype": "float32"}', b'{"dtype": "float32"}'),
    ],
)
def test_dtype_in_config_text(before, after):
    assert with_dtype(before, "float32") == after


class TestWrongBase:
    def test_other_shape(self, adapter, tmp_path):
        base = write_base(tmp_path / "other", {**MOE, "moe_intermediate_size": 8})
        with pytest.raises(AdapterError, match=r"experts.*\[16, 24\].*got \[8, 24\]"):
            merge(adapter, tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 1}, "does not have"),
            ({"num_experts": 4}, r"does not have|is for 5 experts"),
            ({"num_experts": 8}, "is for 5 experts in .*got 8"),
            ({"num_hidden_layers": 3}, r"no factors for model\.layers\.2"),
            ({"mlp_only_layers": [0]}, "does not have"),
        ],
    )
    def test_other_structure(self, adapter, tmp_path, change, message):
        base = write_base(tmp_path / "other", {**MOE, **change})
        with pytest.raises(AdapterError, match=message):
            merge(adapter, tmp_path / "merged", base=base)

    def test_same_shape_elsewhere_is_a_warning(self, adapter, tmp_path):
        base = write_base(tmp_path / "other", MOE, seed=5)
        report = merge(adapter, tmp_path / "merged", base=base)
        assert any("names" in warning and "could not be compared" in warning for warning in report.warnings)

    def test_changed_since_training(self, tmp_path):
        """With the fingerprint in the sidecar, another base of the same shape is noticed."""
        from finetune.adapters.files import FORMAT_VERSION, SIDECAR
        from finetune.models.checkpoint import Checkpoint, base_fingerprint

        base = write_base(tmp_path / "base", MOE)
        adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
        other = Checkpoint.open(write_base(tmp_path / "other", MOE, seed=5))
        content = {"format_version": FORMAT_VERSION, "base_fingerprint": base_fingerprint(other)}
        (adapter / SIDECAR).write_text(json.dumps(content))
        with pytest.raises(ModelError, match="fingerprint"):
            merge(adapter, tmp_path / "merged")
        report = merge(adapter, tmp_path / "merged", base=base)
        assert any("fingerprint" in warning for warning in report.warnings)
        assert not merge(adapter, tmp_path / "right", base=other.path).warnings

    def test_unknown_base(self, adapter, tmp_path):
        copy = tmp_path / "adapter"
        copy.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (copy / name).write_bytes((adapter / name).read_bytes())
        edit_json(copy / "adapter_config.json", base_model_name_or_path=None)
        with pytest.raises(AdapterError, match="which base model"):
            merge(copy, tmp_path / "merged")
        edit_json(copy / "adapter_config.json", base_model_name_or_path="no-such/model-anywhere")
        with pytest.raises(ModelError, match="local hub cache"):
            merge(copy, tmp_path / "merged")

    def test_quantized_base(self, moe, adapter, tmp_path):
        base = write_base(tmp_path / "base", MOE)
        edit_json(base / "config.json", quantization_config={"quant_method": "fp8"})
        with pytest.raises(ModelError, match="quantized"):
            merge(adapter, tmp_path / "merged", base=base)

    def test_not_a_qwen3(self, adapter, tmp_path):
        base = write_base(tmp_path / "base", MOE)
        edit_json(base / "config.json", model_type="llama")
        with pytest.raises(ModelError, match="is of a model type that is not supported"):
            merge(adapter, tmp_path / "merged", base=base)

    def test_missing_shard(self, adapter, tmp_path):
        base = write_base(tmp_path / "base", MOE)
        (base / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: is missing"):
            merge(adapter, tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()

    def test_tied_head_cannot_change(self, tmp_path):
        base = write_base(tmp_path / "base", DENSE)
        adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])

        def rename(tensors):
            tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(5, 24)
            tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(272, 5)

        edit_tensors(adapter / "adapter_model.safetensors", rename)
        with pytest.raises(AdapterError, match="lm_head"):
            merge(adapter, tmp_path / "merged")


def _weights_and_sides(path):
    """Files of a merged model but for its card, which the base does not have."""
    files = _files(path)
    del files["README.md"]
    return files


def _files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
