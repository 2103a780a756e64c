"""K-quants by ggml's own code, read back by another implementation and run by llama.cpp."""

import pytest
import torch

from finetune.errors import UserError
from finetune.formats import ggml
from finetune.formats.export import export
from finetune.formats.registry import make_format
from tests.checkpoints import DENSE, MOE, read_all, write_base

gguf = pytest.importorskip("gguf", reason="needs the gguf package")
pytest.importorskip("xllamacpp", reason="needs a library with ggml in it")
WIDE = {**MOE, "hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 3}
ALLOWED = {"Q4_K": 1 / 12, "Q5_K": 1 / 25, "Q6_K": 1 / 40, "Q8_0": 1 / 200}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("k") / "base", WIDE)


def tensors_of(folder):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize("mix", ggml.MIXES)
def test_read_back(base, tmp_path, mix):
    export(base, tmp_path / "out", make_format("gguf", {"type": mix}))
    before, after = read_all(base), tensors_of(tmp_path / "out")
    for name, bank in (("down", "blk.1.ffn_down_exps.weight"), ("up", "blk.2.ffn_up_exps.weight")):
        kind = after[bank].tensor_type
        found = torch.tensor(gguf.dequantize(after[bank].data, kind))
        assert found.shape == (5, 256, 256)
        for expert in range(5):
            wanted = before[f"model.layers.{bank[4]}.mlp.experts.{expert}.{name}_proj.weight"]
            assert (found[expert] - wanted).abs().max() <= ALLOWED[kind.name] * wanted.abs().max()
    assert after["output.weight"].tensor_type.name == "Q6_K"
    assert after["token_embd.weight"].tensor_type.name == ggml.MIXES[mix]
    assert {after[name].tensor_type.name for name in after if "norm" in name or "gate_inp" in name} == {"F32"}
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert gguf.LlamaFileType(reader.get_field("general.file_type").contents()).name == f"MOSTLY_{mix}"


def test_mixes():
    """What `llama-quantize` gives a model of 48 layers."""
    more = [
        layer
        for layer in range(48)
        if ggml.type_in_mix("Q4_K_M", f"blk.{layer}.attn_v.weight", 48, tied=False) == "Q6_K"
    ]
    assert more == [*range(6), *range(8, 42, 3), *range(42, 48)]
    assert ggml.type_in_mix("Q5_K_M", "blk.0.attn_k.weight", 48, tied=False) == "Q5_K"
    assert ggml.type_in_mix("Q5_K_M", "token_embd.weight", 48, tied=True) == "Q6_K"
    assert ggml.type_in_mix("Q4_K_S", "blk.3.attn_v.weight", 48, tied=False) == "Q5_K"
    assert ggml.type_in_mix("Q4_K_S", "blk.6.ffn_down_exps.weight", 48, tied=False) == "Q4_K"


def test_rows_that_are_no_whole_block(tmp_path):
    base = write_base(tmp_path / "base", {**DENSE, "hidden_size": 64, "intermediate_size": 80})
    export(base, tmp_path / "out", make_format("gguf", {"type": "Q4_K_M"}))
    after = tensors_of(tmp_path / "out")
    assert after["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert after["blk.0.ffn_down.weight"].tensor_type.name == "F16"


def test_no_library(base, tmp_path, monkeypatch):
    ggml.load_ggml.cache_clear()
    monkeypatch.setattr(ggml, "_libraries", lambda: [str(tmp_path / "no.so"), "libc.so.6"])
    with pytest.raises(UserError, match=r"K-quants need ggml's library(.|\n)*pip install xllamacpp"):
        export(base, tmp_path / "out", make_format("gguf", {"type": "Q4_K_M"}))
    ggml.load_ggml.cache_clear()
    assert not (tmp_path / "out").exists()
