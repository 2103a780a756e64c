"""What a card says is true, is no more than is known, and leads nowhere."""

import json

import pytest
import yaml

from finetune.adapters.card import CardFacts, adapter_card, base_license, public_name
from finetune.adapters.stock_config import StockConfig

SETTINGS = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen3-30B-A3B",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj"],
}
TRAINING = {
    "steps": 60, "best_step": 40, "rows": 3000, "tokens": 97794, "loss_tokens": 18032, "trained_parameters": 122880,
    "train_loss_first": 5.2, "train_loss_last": 1.25, "eval_rows": 200, "eval_loss_before": 10.24, "eval_loss": 2.5,
    "eval_exact_match_before": 0.0, "eval_exact_match": 0.5, "datasets": ["owner/rows", "/rows.jsonl"],
}  # fmt: skip


def facts(tmp_path, sidecar=None, **settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return CardFacts.of(StockConfig.open(tmp_path), sidecar)


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_of_ours(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: L\n---\n# Base\n")
    plan = {"experts_by_layer": {"0": [1, 2], "1": [3]}, "num_experts": 8}
    sidecar = {"training": TRAINING, "experts": plan, "thinking": False}
    card = adapter_card(facts(tmp_path, sidecar), base)
    assert metadata(card) == {
        "base_model": "Qwen/Qwen3-30B-A3B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "finetune", "mixture-of-experts"],
        "license": "apache-2.0",
        "license_link": "L",
        "datasets": ["owner/rows"],
    }
    for text in (
        "`q_proj`, `experts.gate_up_proj`: rank 8, alpha 16",
        "3 of 16 experts train, in 2 layers",
        "3,000 training rows, 97,794 tokens, 18,032 of them with loss; data: `owner/rows`",
        "60 optimizer steps, the weights are those of step 40",
        "| loss on 200 held-out rows | 10.2400 | 2.5000 |",
        "| exact match on 200 held-out rows | 0.00% | 50.00% |",
        "PEFT 0.19 or later",
        "--to vllm",
        "enable_thinking=False",
    ):
        assert text in card
    assert "rows.jsonl" not in card


def test_an_adapter_of_another_tool_is_told_by_its_settings_alone(tmp_path):
    path = str(tmp_path / "secret" / "my-base")
    card = adapter_card(facts(tmp_path, base_model_name_or_path=path, target_parameters=None), None)
    assert metadata(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "finetune"],
    }
    assert "my-base" in card
    assert not any(text in card for text in ("secret", "Numbers", "Trained with", "rows", "enable_thinking"))


def test_what_no_other_program_takes_is_not_offered(tmp_path):
    plan = {"experts_by_layer": {"0": [1]}, "num_experts": 8}
    whole = {"expert_mode": "full", "expert_targets": ["down_proj"], "experts": plan}
    card = adapter_card(facts(tmp_path, whole, peft_type="FINETUNE_EXPERT_WEIGHTS", target_parameters=None), None)
    assert "`down_proj` of experts whole" in card
    assert "PeftModel" not in card
    router = adapter_card(facts(tmp_path, {}, target_parameters=["mlp.gate.weight"]), None)
    assert "take no adapter of a router: merge it" in router
    assert not any("--to vllm" in text for text in (card, router))


def test_hostile_files_say_nothing(tmp_path):
    training = {"steps": "<b>", "rows": 1, "datasets": ["../x", 3], "eval_loss": True}
    card = adapter_card(facts(tmp_path, {"training": training}, target_modules=["`<script>`q"]), None)
    assert not any(text in card for text in ("<script>", "<b>", "../x", "Numbers", "optimizer steps"))
    for text in ("---\nlicense: [x]\n---", "---\nlicense: x", "---\n: {\n---", "# no metadata"):
        (tmp_path / "README.md").write_text(text)
        assert base_license(tmp_path) == {}


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (None, (None, False)),
        ("/data/models/mine", ("mine", False)),
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", True)),
        ("/c/hub/models--Qwen--Qwen3-0.6B/snapshots/abc", ("Qwen/Qwen3-0.6B", True)),
    ],
)
def test_a_base_is_named_without_its_folder(base, told):
    assert public_name(base) == told
