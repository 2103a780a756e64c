"""Sizes from config.json, and the facts `finetune check` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.architecture.shape import ModelShape, read_model_shape
from finetune.config.load import load_recipe
from finetune.config.schema import AdapterSection
from finetune.config.summary import summarize

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "attention_bias": False}
SMALL = QWEN3 | {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
A3B = QWEN3 | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
A22B = A3B | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536}


def shape_of(config: dict, folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_shape(folder)


@pytest.mark.parametrize(
    ("config", "parameters"), [(SMALL, 596_049_920), (A3B, 30_532_122_624), (A22B, 235_093_634_560)]
)
def test_parameters_of_the_published_models(config, parameters, tmp_path):
    assert shape_of(config, tmp_path).parameters() == parameters


def trainable(shape, adapter):
    per_expert = adapter.expert_parameters(shape.hidden, shape.expert_intermediate)
    return adapter.parameters_outside(shape) + shape.moe_layers * shape.experts * per_expert


def test_trainable_parameters_are_rank_times_in_plus_out(tmp_path):
    shape = shape_of(A3B, tmp_path)
    experts = AdapterSection(attention=(), experts=("gate_up_proj", "down_proj"), rank=1)
    assert trainable(shape, experts) == 48 * 128 * ((2048 + 2 * 768) + (768 + 2048)) == 39_321_600
    assert trainable(shape, AdapterSection(attention=("k_proj",), rank=4)) == 48 * 4 * (2048 + 512)
    both = AdapterSection(attention=("k_proj",), experts=("down_proj",), rank=4, expert_rank=2)
    assert trainable(shape, both) == 48 * 4 * (2048 + 512) + 48 * 128 * 2 * (768 + 2048)
    dense = shape_of(SMALL, tmp_path)
    assert trainable(dense, AdapterSection(attention=(), mlp=("up_proj", "down_proj"), rank=3)) == 28 * 2 * 3 * 4096


def test_dense_layers_among_experts(tmp_path):
    mixed = shape_of(A3B | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 4]}, tmp_path)
    assert (mixed.moe_layers, mixed.dense_layers) == (23, 25)
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in A3B.items()}
    assert shape_of(renamed, tmp_path) == shape_of(A3B, tmp_path)


@pytest.fixture
def recipe_file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    shape_of(A3B, Path("model"))
    Path("a.jsonl").write_text("{}\n")
    Path("b.jsonl").write_text("{}\n")
    Path("r.yaml").write_text(
        "model: {path: model}\nadapter: {experts: [down_proj], rank: 8, alpha: 16, expert_rank: 2}\n"
        "data: {train: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]}\n"
        "train: {steps: 5}\noutput: {dir: runs/x}\n"
    )
    return "r.yaml"


def test_summary_is_json_and_says_what_would_train(recipe_file):
    facts = json.loads(json.dumps(summarize(load_recipe(recipe_file))))
    assert facts["total_parameters"] == 30_532_122_624
    assert facts["trainable_parameters"] == 48 * 8 * 17408 + 48 * 128 * 2 * (768 + 2048)
    trainable = facts["trainable_parameters"]
    assert facts["trainable_share"] == trainable / (facts["total_parameters"] + trainable)  # as train says it
    assert facts["adapter"]["expert_alpha"] == 4.0
    assert facts["data"]["train"] == [{"path": "a.jsonl", "share": 0.75}, {"path": "b.jsonl", "share": 0.25}]
    assert (facts["steps"], facts["epochs"], facts["tokens_per_step"]) == (5, None, 2048 * 8)
    assert facts["output"] == "runs/x"
    assert facts["warnings"] == ["5 steps hardly move an adapter: raise train.steps"]


def test_what_trains_of_a_part_of_the_experts(recipe_file):
    quarter = summarize(load_recipe(recipe_file, "experts.select={top_fraction: 0.25}"))
    assert quarter["trainable_parameters"] == 48 * 8 * 17408 + 48 * 32 * 2 * (768 + 2048)
    assert quarter["experts_that_train"] == {"score": "tokens", "top_fraction": 0.25}
    hot = summarize(load_recipe(recipe_file, "experts={score: gate, select: {top_p: 0.2}}"))
    assert "trainable_parameters" not in hot
    assert hot["experts_that_train"] == {"score": "gate", "top_p": 0.2}
    assert "experts_that_train" not in summarize(load_recipe(recipe_file))


def test_summary_without_a_local_model(recipe_file):
    facts = summarize(load_recipe(recipe_file, "model.path=Qwen/Qwen3-30B-A3B", "train.steps=null"))
    assert "trainable_parameters" not in facts
    assert (facts["steps"], facts["epochs"]) == (None, 1.0)
    assert "from the hub" in facts["warnings"][0]


def test_warnings(recipe_file):
    Path("runs/x").mkdir(parents=True)
    warnings = summarize(
        load_recipe(
            recipe_file,
            "model.trust_remote_code=true",
            "adapter.expert_rank=1024",
            "adapter.rank=4096",
            "train.save_every=6",
            "train.batch_size=2",
            "model.attention_implementation=sdpa",
            "experts={select: {top_p: 0.2}, reselect: {every: 6}}",
        )
    )["warnings"]
    for part in (
        "trust_remote_code",
        "runs/x exists",
        "adapter.rank 4096",
        "adapter.expert_rank 1024",
        "train.save_every 6",
        "model.attention_implementation sdpa masks",
        "experts.reselect.every 6",
    ):
        assert sum(part in warning for warning in warnings) == 1, warnings
