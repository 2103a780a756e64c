"""Finding things in live models."""

import pytest

from finetune.architecture.names import layer_index
from finetune.errors import ModelError
from finetune.models.live import expert_modules, projection_names
from tests.adapters.models import adapted
from tests.tiny import tiny_dense, tiny_moe


def test_expert_banks_in_layer_order():
    model = tiny_moe(num_hidden_layers=12, mlp_only_layers=[1])
    names = list(expert_modules(model))
    assert [layer_index(name) for name in names] == [0, *range(2, 12)]
    assert names[0] == "model.layers.0.mlp.experts"
    assert expert_modules(tiny_dense()) == {}
    assert len(expert_modules(adapted())) == 2


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.7.self_attn.q_proj", 7),
        ("base_model.model.model.layers.31.mlp.experts.base_layer", 31),
        ("layers.0.mlp", 0),
        ("model.layers.2.mlp.experts.5.gate_proj.weight", 2),
    ],
)
def test_layer_index(name, index):
    assert layer_index(name) == index


@pytest.mark.parametrize("name", ["lm_head", "model.layers", "model.layers.x.mlp", "sublayers.3.mlp"])
def test_no_layer(name):
    with pytest.raises(ModelError, match="lies in no decoder layer"):
        layer_index(name)


def test_projections():
    model = tiny_moe(mlp_only_layers=[1])
    assert projection_names(model, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert projection_names(model, ["down_proj", "up_proj"]) == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert projection_names(tiny_moe(), ["down_proj"]) == []
    assert projection_names(model, ["lm_head", "gate"]) == []
    assert len(projection_names(tiny_dense(), ["gate_proj", "k_proj"])) == 4
