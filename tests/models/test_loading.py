"""Loading models and tokenizers: what comes back, and every way a folder can be wrong."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from finetune.errors import ModelError
from finetune.models.loading import load_model, load_tokenizer, stored_dtype
from tests.adapters.models import adapted, logits
from tests.tiny import save_as_hub, save_tokenizer, tiny_dense, tiny_moe


@pytest.fixture
def hub(tmp_path):
    folder = save_as_hub(tiny_moe(), tmp_path / "model", shards=3)
    save_tokenizer(folder)
    return folder


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_moe_comes_back_whole(hub):
    model = load_model(hub, dtype=torch.float32)
    assert torch.equal(logits(model), logits(tiny_moe()))
    assert not model.training
    assert model.config.output_router_logits is False
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_weight_of_a_moe_keeps_its_checkpoint_mapped(hub):
    model = load_model(hub, dtype=torch.float32)
    assert str(hub) not in Path("/proc/self/maps").read_text()
    assert torch.equal(logits(model), logits(tiny_moe()))


def test_dense_single_file_other_dtype_and_attention(tmp_path):
    folder = save_as_hub(tiny_dense(tie_word_embeddings=True), tmp_path / "dense", shards=1)
    model = load_model(str(folder), dtype=torch.bfloat16, attention_implementation="eager", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_router_losses_are_off_even_if_the_checkpoint_asks(hub):
    set_config(hub, output_router_logits=True)
    assert load_model(hub, dtype=torch.float32).config.output_router_logits is False


def test_nothing_is_printed_and_logging_is_as_before(hub, capfd):
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(hub, dtype=torch.float32)
    load_tokenizer(hub)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_stored_dtype(hub):
    assert stored_dtype(hub) == torch.float32
    for spelling, dtype in (("torch_dtype", torch.bfloat16), ("dtype", torch.float16)):
        set_config(hub, **{"torch_dtype": None, "dtype": None, spelling: str(dtype).removeprefix("torch.")})
        assert stored_dtype(hub) == dtype
    set_config(hub, torch_dtype=None, dtype="sum")
    assert stored_dtype(hub) == torch.float32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, "is of a model type that is not supported, got 'llama'"),
        ({"model_type": None}, "is of a model type that is not supported"),
        ({"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}, "wants to run Python code that ships with it"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is stored quantized, got 'fp8'"),
        ({"num_experts": 8}, "gate_up_proj: has another shape than config.json says"),
        ({"hidden_size": 16}, "has another shape than config.json says"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight: is missing"),
        ({"num_hidden_layers": 1}, "layers.1.*: has no place in the model"),
        ({"num_attention_heads": "four"}, "num_attention_heads: must be a whole number"),
    ],
)
def test_a_config_that_does_not_fit(hub, changes, expected):
    set_config(hub, **changes)
    with pytest.raises(ModelError, match=expected) as error:
        load_model(hub, dtype=torch.float32)
    assert all(problem.hint for problem in error.value.problems)


def truncate(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "model-00002-of-00003.safetensors"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "model-00001-of-00003.safetensors: is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "has neither"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_a_damaged_folder(hub, damage, expected):
    damage(hub)
    with pytest.raises(ModelError, match=expected):
        load_model(hub, dtype=torch.float32)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "Qwen3-0.6B", "a/b/c"])
def test_what_is_neither_folder_nor_hub_name(name):
    for load in (lambda: load_model(name, dtype=torch.float32), lambda: load_tokenizer(name)):
        with pytest.raises(ModelError, match="is no folder"):
            load()


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no-such-owner/no-such-model: cannot be loaded"):
        load_model("no-such-owner/no-such-model", dtype=torch.float32)


def test_an_adapter_is_not_a_model(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is an adapter, not a model\nhint: use finetune.load"):
        load_model(tmp_path / "adapter", dtype=torch.float32)


def test_a_tokenizer_with_all_it_needs(hub):
    tokenizer = load_tokenizer(hub)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_no_tokenizer_is_an_error_not_an_empty_one(tmp_path):
    folder = save_as_hub(tiny_moe(), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_that_lacks_things(hub):
    (hub / "chat_template.jinja").unlink()
    config = json.loads((hub / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    config.pop("eos_token")
    (hub / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        load_tokenizer(hub)
    text = str(error.value)
    for missing in ("padding token", "end-of-sequence token", "chat template"):
        assert f"the tokenizer has no {missing}" in text
