"""YaRN from the recipe's words to the adapter, the model below it, and the merged checkpoint."""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finetune.adapters.attach import attach, load_adapter, save_adapter
from finetune.adapters.files import AdapterFiles
from finetune.config.rope import scaled, with_scaling
from finetune.config.schema import QuantizeSection, RopeScalingSection
from finetune.errors import AdapterError, VerifyError
from finetune.formats.export import export
from finetune.merging.merge import merge
from finetune.quant.load import load_frozen
from finetune.verification.verify import verify
from tests.checkpoints import MOE, plain_logits, token_batch, write_base

YARN = RopeScalingSection(type="yarn", factor=4.0, original_max_position_embeddings=16).as_config


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", MOE)


def train(base, path, scaling=YARN):
    model = attach(
        load_frozen(base, dtype=torch.float32, rope_scaling=scaling), {"attention": ("q_proj",), "rank": 2}, seed=0
    )
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(2):
        ids = torch.randint(20, (2, 40), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, path)
    return path


@pytest.mark.parametrize("section", [None, QuantizeSection(scheme="nf4", attention=False)])
def test_positions_are_transformers_own(base, section):
    model = load_frozen(base, section, dtype=torch.float32, rope_scaling=YARN)
    rotary = model.model.rotary_emb
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {**config.rope_parameters, **YARN}
    inv_freq, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert torch.equal(rotary.inv_freq, inv_freq)
    assert rotary.attention_scaling == factor
    assert not torch.equal(rotary.inv_freq, load_frozen(base, dtype=torch.float32).model.rotary_emb.inv_freq)


def test_the_adapter_brings_it_and_the_merged_model_has_it(base, tmp_path):
    path = train(base, tmp_path / "adapter")
    adapted = load_adapter(
        load_frozen(base, dtype=torch.float32, rope_scaling=AdapterFiles.open(path).rope_scaling), path
    )
    ids = token_batch()
    with torch.no_grad():
        want = adapted(input_ids=ids).logits
    merge(path, tmp_path / "merged")
    got = plain_logits(tmp_path / "merged")
    assert (got - want).abs().max() <= 1e-4
    assert (got - plain_logits(base)).abs().max() > 1e-3
    assert verify(path, tmp_path / "merged").logits.max_difference <= 1e-4
    before, after = (json.loads((p / "config.json").read_text()) for p in (base, tmp_path / "merged"))
    assert after == scaled(before, YARN)
    export(path, tmp_path / "served", "vllm")
    assert "yarn-orig-ctx 16" in (tmp_path / "served/SERVING.md").read_text()


def test_a_merged_model_without_it_is_told(base, tmp_path):
    path = train(base, tmp_path / "adapter")
    merge(path, tmp_path / "merged")
    (tmp_path / "merged/config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(VerifyError, match="rope"):
        verify(path, tmp_path / "merged")


@pytest.mark.parametrize(("trained", "loaded"), [(YARN, None), (YARN, {**YARN, "factor": 2.0}), (None, YARN)])
def test_an_adapter_does_not_go_on_other_positions(base, tmp_path, trained, loaded):
    path = train(base, tmp_path / "adapter", trained)
    with pytest.raises(AdapterError, match=r"rope_scaling.*(other|not)") as error:
        load_adapter(load_frozen(base, dtype=torch.float32, rope_scaling=loaded), path)
    assert "finetune.load(path)" in str(error.value)


def test_another_scaling_in_the_settings_gives_way(base):
    config = json.loads((base / "config.json").read_text())
    linear = {"rope_type": "linear", "factor": 8.0, "attention_factor": 3.0}
    theta = config.pop("rope_theta", None) or config["rope_parameters"]["rope_theta"]
    plain = load_frozen(base, dtype=torch.float32, rope_scaling=YARN).model.rotary_emb
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": theta, **linear}}))
    found = load_frozen(base, dtype=torch.float32, rope_scaling=YARN).model.rotary_emb
    assert torch.equal(found.inv_freq, plain.inv_freq)
    assert found.attention_scaling == plain.attention_scaling
    changed = json.loads(with_scaling((base / "config.json").read_bytes(), YARN))
    assert changed["rope_parameters"] == {"rope_theta": theta, **YARN}


def test_adapters_of_different_positions_are_not_added(base, tmp_path):
    paths = [train(base, tmp_path / "one"), train(base, tmp_path / "two", None)]
    with pytest.raises(AdapterError, match="other positions"):
        merge(paths, tmp_path / "merged")


def test_no_other_byte_of_the_settings_changes():
    content = b'{\n "a": 1,\n    "rope_scaling":   null, "rope_theta": 1e6}\n'
    assert with_scaling(content, None) == content
    changed = with_scaling(content, YARN)
    assert changed == content.replace(b"null", json.dumps(YARN).encode())
    newer = b'{"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}'
    assert json.loads(with_scaling(newer, YARN)) == {"rope_parameters": {"rope_theta": 5.0, **YARN}}
    assert json.loads(with_scaling(b"{}", YARN)) == {"rope_scaling": YARN}
