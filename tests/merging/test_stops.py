"""What training taught as the end is a stop token of what is merged, and the note beside an export names it."""

import json

import pytest
import torch

from finetune.adapters.attach import attach, load_adapter, save_adapter
from finetune.formats.export import export
from finetune.formats.registry import make_format
from finetune.formats.serving_note import Use
from finetune.merging.merge import merge
from finetune.models.loading import load_model
from finetune.verification.verify import verify
from tests.checkpoints import write_adapter, write_base
from tests.formats.test_adapter_export import SOURCES

END = 257  # <|im_end|>


@pytest.fixture
def base_and_adapter(tmp_path):
    """A base that stops at <|endoftext|> alone, as base models do, and an adapter that was taught <|im_end|>."""
    config, chosen = SOURCES["dense"]
    base = write_base(tmp_path / "base", config)
    (base / "generation_config.json").write_text('{"eos_token_id": 256, "top_k": 20}')
    adapter = write_adapter(tmp_path / "adapter", base, std=0.1, **chosen)
    sidecar = {"format_version": 1, "thinking": False, "ends": [END]}
    (adapter / "finetune_adapter.json").write_text(json.dumps(sidecar))
    return base, adapter


def test_a_merged_model_stops_where_training_taught_it_to(base_and_adapter, tmp_path):
    base, adapter = base_and_adapter
    report = merge(adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/generation_config.json").read_text()) == {
        "eos_token_id": [256, END],
        "top_k": 20,
    }
    assert any("<|im_end|> (257)" in warning for warning in report.warnings)
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == 256


def test_verify_expects_that_file_and_no_other(base_and_adapter, tmp_path):
    adapter = base_and_adapter[1]
    merge(adapter, tmp_path / "merged")
    assert not any("generation_config" in warning for warning in verify(adapter, tmp_path / "merged").notes)
    (tmp_path / "merged/generation_config.json").write_text('{"eos_token_id": 256}')
    assert any("generation_config" in warning for warning in verify(adapter, tmp_path / "merged").notes)


def test_a_saved_adapter_names_the_end_at_which_its_base_goes_on(base_and_adapter, tmp_path):
    base, _ = base_and_adapter
    model = attach(load_model(base, dtype=torch.float32), {"attention": ["q_proj"], "rank": 4})
    model.generation_config.eos_token_id = END  # as trainers do
    (note,) = save_adapter(model, tmp_path / "saved", thinking=False, ends=[END])
    assert "names 257" in note
    assert json.loads((tmp_path / "saved/generation_config.json").read_text()) == {"eos_token_id": [256, END]}
    assert json.loads((tmp_path / "saved/finetune_adapter.json").read_text())["ends"] == [END]
    assert save_adapter(model, tmp_path / "saved", ends=[256]) == []
    assert not (tmp_path / "saved/generation_config.json").exists()
    load_adapter(load_model(base, dtype=torch.float32), tmp_path / "saved")


def test_a_base_that_stops_there_keeps_its_file(base_and_adapter, tmp_path):
    base, adapter = base_and_adapter
    (base / "generation_config.json").write_text('{"eos_token_id": [257,   256]}')
    report = merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged/generation_config.json").read_text() == '{"eos_token_id": [257,   256]}'
    assert not any("im_end" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("to", "told"),
    [("vllm", '"stop_token_ids": [257]'), ("peft", "eos_token_id=[257]"), ("gguf-lora", '["<|im_end|>"]')],
)
def test_the_note_names_the_end(to, told, base_and_adapter, tmp_path):
    if to == "gguf-lora":
        pytest.importorskip("gguf")
    export(base_and_adapter[1], tmp_path / "out", to)
    note = (tmp_path / "out/SERVING.md").read_text()
    assert "`<|im_end|>` (257)" in note
    assert told in note


def test_the_note_names_no_switch_that_the_template_ignores(base_and_adapter, tmp_path):
    base, adapter = base_and_adapter
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for thinking in (None, True, False):
        export(adapter, tmp_path / str(thinking), make_format("vllm", {"thinking": thinking}))
        assert "enable_thinking" not in (tmp_path / str(thinking) / "SERVING.md").read_text()


@pytest.mark.parametrize(
    ("asks", "default"),
    [
        ("{% if enable_thinking is defined and enable_thinking is false %}", True),
        ("{%- if enable_thinking is defined and not enable_thinking -%}", True),
        ("{%- if enable_thinking is defined and enable_thinking is true %}", False),
        ("{% if enable_thinking %}", False),
    ],
)
def test_the_default_is_the_templates(asks, default, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(asks + "x{% endif %}")
    assert Use.of(tmp_path, True).default is default
    assert (Use.of(tmp_path, default).switch, Use.of(tmp_path, not default).switch) == (
        None,
        json.dumps({"enable_thinking": not default}),
    )
