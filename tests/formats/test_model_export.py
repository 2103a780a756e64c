"""Models in other forms: what is written says the same, up to the rounding of the form."""

import json
import shutil

import pytest
import torch

from finetune.errors import ModelError, UserError
from finetune.formats.export import export
from finetune.formats.hf import Hf
from finetune.formats.registry import make_format
from finetune.formats.rounded import Fp8, Int4
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint
from tests.checkpoints import (
    DENSE,
    MOE,
    edit_json,
    edit_tensors,
    load_plain,
    plain_logits,
    read_all,
    write_base,
)

WIDE = {**MOE, "hidden_size": 32, "moe_intermediate_size": 64, "head_dim": 16, "mlp_only_layers": [1]}
MATRICES = 2 * 4 + 3 * 5 + 3  # attention of two layers, five experts of one, the MLP of the other


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model") / "base", {**WIDE, "intermediate_size": 96}, shards=3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model") / "dense", DENSE, dtype=torch.bfloat16, shards=1)


def config_of(path):
    return json.loads((path / "config.json").read_text())


class TestShards:
    def test_same_tensors_in_other_files(self, base, tmp_path):
        report = export(base, tmp_path / "out", Hf(shard_gb=4e-5))
        before, after = read_all(base), read_all(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert report.facts["shards"] == len(shards) > 3
        assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
        largest = max(value.nbytes for value in before.values())
        assert all(path.stat().st_size <= max(40_000, largest) + 8000 for path in shards)
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
        assert (plain_logits(base) - plain_logits(tmp_path / "out")).abs().max() == 0
        for name in ("tokenizer.json", "generation_config.json", "LICENSE", "config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()

    def test_one_file_and_another_dtype(self, base, tmp_path):
        export(base, tmp_path / "out", make_format("hf", {"dtype": "bf16"}))
        before, after = read_all(base), read_all(tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
        assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
        assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"
        load_plain(tmp_path / "out")


class TestFp8:
    def test_blocks(self, base, tmp_path):
        report = export(base, tmp_path / "out", Fp8(shard_gb=3e-5))
        assert report.facts["quantized matrices"] == MATRICES
        before, written = read_all(base), Checkpoint.open(tmp_path / "out")
        assert written.fp8_block == (128, 128)
        assert set(written.weights) == set(before)
        quantized = [name for name in before if written.scales_of(name)]
        assert len(quantized) == MATRICES
        for name, weight in before.items():
            found = written.read_float(name)
            if name not in quantized:
                assert torch.equal(found, weight)
                continue
            assert written.tensors[name].shard == written.tensors[f"{name}_scale_inv"].shard
            error = (found - weight).abs()
            assert (error <= weight.abs() / 16 + weight.abs().max() / 448 / 512).all()

    def test_merging_into_an_exported_model_and_back(self, base, tmp_path):
        export(base, tmp_path / "fp8", "fp8")
        export(tmp_path / "fp8", tmp_path / "bf16", make_format("hf", {"dtype": "bf16"}))
        assert "quantization_config" not in config_of(tmp_path / "bf16")
        near, far = plain_logits(base), plain_logits(tmp_path / "bf16")
        assert (near - far).abs().mean() < near.std() / 5
        with pytest.raises(UserError, match="quantized already"):
            export(tmp_path / "fp8", tmp_path / "again", "int4")

    def test_rows(self, base, tmp_path):
        export(base, tmp_path / "out", "fp8-ct")
        before, after = read_all(base), read_all(tmp_path / "out")
        assert sum(name.endswith("weight_scale") for name in after) == MATRICES
        for name, weight in before.items():
            if f"{name}_scale" in after:
                found = after[name].float() * after[f"{name}_scale"]
                assert after[f"{name}_scale"].shape == (len(weight), 1)
                assert (found - weight).abs().max() <= weight.abs().max() / 16
        settings = config_of(tmp_path / "out")["quantization_config"]
        assert settings["format"] == "float-quantized"
        assert settings["ignore"] == ["lm_head", "re:.*mlp\\.gate$"]


def unpacked(words):
    """Codes -8 to 7 of int32 words, eight each, the lowest bits first."""
    codes = (words.long()[:, :, None] >> (4 * torch.arange(8))) & 15
    return codes.reshape(len(words), -1) - 8


def test_int4(base, tmp_path):
    report = export(base, tmp_path / "out", make_format("int4", {"group": 32}))
    before, after = read_all(base), read_all(tmp_path / "out")
    assert report.facts["quantized matrices"] == MATRICES == sum(name.endswith("_packed") for name in after)
    for name, weight in before.items():
        if name in after:
            assert torch.equal(after[name], weight)
            continue
        scales, codes = after[f"{name}_scale"].float(), unpacked(after[f"{name}_packed"])
        assert after[f"{name}_shape"].tolist() == list(weight.shape)
        found = (codes.view(len(weight), -1, 32) * scales[:, :, None]).view(weight.shape)
        grouped = (found - weight).abs().view(len(weight), -1, 32)
        assert (grouped <= scales[:, :, None] * 0.55).all()
        assert codes.min() == -8
        assert codes.max() == 7
    assert {name for name in before if name in after} == {name for name in before if "_proj" not in name}
    group = config_of(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 32


def dequantized(path, base):
    """The exported weights multiplied out, by the rules of the formats, under the base's names."""
    after, found = read_all(path), {}
    for name, weight in read_all(base).items():
        if f"{name}_packed" in after:
            codes = unpacked(after[f"{name}_packed"]).view(len(weight), -1, 32)
            found[name] = (codes * after[f"{name}_scale"].float()[:, :, None]).view(weight.shape)
        elif f"{name}_scale" in after:
            found[name] = after[name].float() * after[f"{name}_scale"]
        elif f"{name}_scale_inv" in after:
            found[name] = fp8.dequantize(after[name], after[f"{name}_scale_inv"], fp8.BLOCK)
        else:
            found[name] = after[name].float()
    return found


def plain_logits_of(base, tensors, folder):
    """Logits of the base with its weights replaced."""
    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        edit_tensors(file, lambda held: held.update({name: tensors[name] for name in held}))
    return plain_logits(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Every width a multiple of 128, as transformers wants it."""
    config = {**MOE, "hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "intermediate_size": 128}
    return write_base(tmp_path_factory.mktemp("model") / "large", config)


def test_fp8_blocks_in_transformers(large, tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    export(large, tmp_path / "out", "fp8")
    wanted = dequantized(tmp_path / "out", large)
    settings = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings, dtype=torch.bfloat16)
    at = "model.layers.1.mlp.experts"
    gate_up_EGH = model.get_parameter(f"{at}.gate_up_proj")
    for expert in range(5):
        ours = torch.cat([wanted[f"{at}.{expert}.{part}_proj.weight"] for part in ("gate", "up")])
        assert torch.allclose(gate_up_EGH[expert].float(), ours, rtol=2**-7)  # transformers gives bfloat16
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(model.get_parameter(q).float(), wanted[q], rtol=2**-7)


def small_groups(to):
    return Int4(group=32) if to == "int4" else to


@pytest.mark.parametrize("to", ["int4", "fp8-ct"])
def test_compressed_tensors_in_transformers(large, tmp_path, to):
    pytest.importorskip("compressed_tensors", reason="optional: pip install compressed-tensors")
    export(large, tmp_path / "out", small_groups(to))
    wanted = plain_logits_of(large, dequantized(tmp_path / "out", large), tmp_path / "wanted")
    found = plain_logits(tmp_path / "out")
    # float-quantized rounds the activations as well
    assert (found - wanted).abs().mean() <= {"int4": 0.02, "fp8-ct": 0.2}[to] * wanted.std()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_read_by_its_own_package(base, tmp_path, kind):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    export(base, tmp_path / "out", make_format("gguf", {"type": kind}))
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    before = read_all(base)
    tensors = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    allowed = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 200, "Q4_0": 1 / 7}[kind]
    for expert in range(5):
        wanted = before[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
        found = tensors["blk.0.ffn_down_exps.weight"][expert]
        assert (found - wanted).abs().max() <= allowed * wanted.abs().max()
    assert torch.equal(tensors["blk.0.ffn_gate_inp.weight"], before["model.layers.0.mlp.gate.weight"])
    assert torch.equal(tensors["output_norm.weight"], before["model.norm.weight"])
    stacked = 3 * 5 - 3  # five experts of three projections are three tensors
    assert len(tensors) == len(before) - stacked
    field = reader.get_field("qwen3moe.expert_count")
    assert field.contents() == 5


class TestRefused:
    def test_options(self, base, tmp_path):
        for to, options, message in (
            ("onnx", {}, "none of peft.* for adapters, gguf.* for models"),
            ("gguf", {"type": "Q9"}, "cannot be written"),
            ("int4", {"group": 24}, "whole number of groups"),
            ("int4", {"group": 4}, "(?s)group: is too small.*at least 8"),
            ("fp8", {"dtype": "bf16"}, "dtype: has no meaning for fp8"),
            ("gguf", {"shard_gb": 1.0}, "shard_gb: has no meaning for gguf"),
            ("hf", {"type": "F16"}, "(?s)type: has no meaning for hf.*hf takes thinking, shard_gb, dtype; "),
            ("hf", {"type": "F16"}, "type is for gguf"),
            ("fp8", {"group": 32}, "(?s)group: has no meaning for fp8.*int4, gptq, awq"),
            ("int4", {"data": ["rows"], "steps": 1}, "(?s)data: has no meaning for int4.*steps: has no meaning"),
            ("hf", {"dtype": "int8"}, "none of bf16"),
            ("hf", {"shard_gb": 1e-9}, "too small"),
        ):
            with pytest.raises(UserError, match=message):
                export(base, tmp_path / "out", make_format(to, options))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("to", ["fp8", "int4", "gguf"])
    def test_weights_that_config_does_not_call_for(self, tmp_path, to):
        base = write_base(tmp_path / "base", {**WIDE, "intermediate_size": 96})
        edit_json(base / "config.json", num_experts=6)
        with pytest.raises(ModelError, match=r"config\.json calls for|lacks some experts"):
            export(base, tmp_path / "out", small_groups(to))

    @pytest.mark.parametrize("to", ["fp8", "fp8-ct", "int4", "gguf"])
    def test_values_that_are_not_finite(self, tmp_path, to):
        base = write_base(tmp_path / "base", {**WIDE, "intermediate_size": 96}, shards=1)
        name = "model.layers.0.mlp.experts.2.up_proj.weight"
        edit_tensors(base / "model.safetensors", lambda tensors: tensors[name].view(-1)[7:8].fill_(float("nan")))
        with pytest.raises(ModelError, match=r"experts\.2\.up_proj.*not finite"):
            export(base, tmp_path / "out", small_groups(to))
        assert not (tmp_path / "out").exists()

    def test_gguf_without_tokenizer_or_template(self, tmp_path):
        base = write_base(tmp_path / "base", MOE)
        edit_json(base / "tokenizer_config.json", chat_template=None)
        with pytest.raises(ModelError, match="chat template"):
            export(base, tmp_path / "out", "gguf")
        (base / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"tokenizer\.json: is missing"):
            export(base, tmp_path / "out", "gguf")

    def test_output_that_is_a_link_or_in_the_model(self, base, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        with pytest.raises(UserError, match="symlink"):
            export(base, tmp_path / "link", "fp8")
        with pytest.raises(UserError, match="base model's folder"):
            export(base, base / "out", "fp8")


def test_a_dense_model(dense, tmp_path):
    report = export(dense, tmp_path / "out", "fp8")
    assert report.facts["quantized matrices"] == 2 * 7
    assert Checkpoint.open(tmp_path / "out").read("model.embed_tokens.weight").dtype == torch.bfloat16


def test_killed_exports_resume(base, tmp_path):
    from tests.io.test_kill import killed

    killed("fp8", base, tmp_path / "fp8", 4)


@pytest.mark.slow
def test_fifty_killed_exports(base, tmp_path):
    from tests.io.test_kill import killed

    killed("fp8", base, tmp_path / "fp8", 30)
    killed("gguf", base, tmp_path / "gguf", 20)
