"""Sizes from config.json: what transformers makes of the same file, left-out fields included."""

from __future__ import annotations

import json

import pytest
import torch

from finetune.architecture.registry import FAMILIES, find_family
from finetune.architecture.shape import shape_of
from finetune.errors import ModelError
from finetune.models.text_model import leave_out_towers_, live_class, live_config, text_model

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 96, "vocab_size": 128, "num_experts": 16, "num_experts_per_tok": 2}
SMALL |= {"num_local_experts": 16, "shared_expert_intermediate_size": 40, "linear_conv_kernel_dim": 3}
SMALL |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
SMALL |= {"moe_intermediate_size": 32, "head_dim": 24, "decoder_sparse_step": 1, "max_position_embeddings": 512}


def live(config, tmp_path):
    """The model that transformers builds from the same config.json, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = live_config(tmp_path)
    with torch.device("meta"):
        model = live_class(settings).from_config(settings)
    leave_out_towers_(model)
    return model


def check(text, tmp_path):
    config = whole(text)
    shape, model = shape_of(config, "config.json"), live(config, tmp_path)
    assert shape.parameters() == sum(p.numel() for p in model.parameters()), config
    matrices = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2}
    kept = {name: size for name, size in shape.linears().items() if name in matrices}
    assert kept == {name: matrices[name] for name in kept}
    assert shape.positions == model.config.get_text_config().max_position_embeddings
    banks = [p for name, p in model.named_parameters() if "experts." in name]
    assert shape.moe_layers * 2 == len(banks)
    assert shape.num_linears == len(shape.linears()) == len(kept) + 3 * shape.experts * shape.moe_layers
    if banks:
        assert banks[0].shape == (shape.experts, 2 * shape.expert_intermediate, shape.hidden)
        assert text_model(model)[1].layers[min(shape.sparse_layers)].mlp.gate.top_k == shape.experts_per_token


def whole(text):
    """The config.json that has the settings of a text model where the family has them."""
    family = find_family(text)
    if family.around is None:
        return text
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]} if "tie_word_embeddings" in text else {}
    outer, inner = family.around.config, family.text.rpartition(".")[2]
    config = {"model_type": family.model_type if not outer else f"{family.model_type}_thinker", inner: text, **tied}
    return {"model_type": family.model_type, outer: config} if outer else config


def sizes_of(model_type):
    return {
        "model_type": FAMILIES[model_type].model_types[-1],
        **{name: SMALL[name] for name in FAMILIES[model_type].sizes},
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_default_is_that_of_transformers(model_type, tmp_path):
    full = sizes_of(model_type)
    check(full, tmp_path)
    for name in full:
        if name != "model_type":
            check({key: value for key, value in full.items() if key != name}, tmp_path)
    check({"model_type": FAMILIES[model_type].model_types[-1]}, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_only_layers": [1]},
        {"mlp_only_layers": None},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 5},
        {"num_key_value_heads": 4, "head_dim": 16},
    ],
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_settings_that_change_the_shape(model_type, change, tmp_path):
    family = FAMILIES[model_type]
    known = {*family.sizes, "tie_word_embeddings"} | (set() if family.query_key_norms == "none" else {"attention_bias"})
    known |= {"mlp_only_layers"} if "decoder_sparse_step" in family.sizes else set()
    change = {key: value for key, value in change.items() if key in known}
    check(sizes_of(model_type) | change, tmp_path)


def test_the_two_spellings_of_the_number_of_experts(tmp_path):
    config = sizes_of("qwen3_moe")
    spelled = {key: value for key, value in config.items() if key != "num_experts"} | {"num_local_experts": 16}
    check(spelled, tmp_path)
    assert shape_of(spelled, "c") == shape_of(config, "c") == shape_of(config | {"num_local_experts": 16}, "c")
    with pytest.raises(ModelError, match="num_experts: contradicts num_local_experts, which is 4, got 16"):
        shape_of(config | {"num_local_experts": 4}, "c")
    with pytest.raises(ModelError, match=r"num_experts: must be a whole number .*, got None"):
        shape_of(spelled | {"num_experts": None}, "c")  # transformers refuses it as well


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.around is not None])
def test_a_text_model_that_transformers_cannot_build_alone_is_refused(model_type):
    with pytest.raises(ModelError, match="has the settings of a text model alone"):
        shape_of(sizes_of(model_type), "config.json")


def test_all_problems_at_once():
    with pytest.raises(ModelError) as caught:
        shape_of(sizes_of("qwen3_moe") | {"hidden_size": "64", "num_hidden_layers": 10**6, "attention_bias": 1}, "c")
    places = [problem.where for problem in caught.value.problems]
    assert places == ["c: hidden_size", "c: num_hidden_layers", "c: attention_bias"]


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": 3}])
def test_unknown_types_are_told_the_known_ones(config):
    with pytest.raises(ModelError, match="is of a model type that is not supported") as caught:
        shape_of(config, "config.json")
    (problem,) = caught.value.problems
    assert "qwen3, qwen3_moe, " in problem.hint
