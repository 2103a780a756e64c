"""One layer at a time gives what the whole model gives."""

import pytest
import torch

from finetune.errors import ModelError
from finetune.models.checkpoint import Checkpoint
from finetune.models.loading import load_model
from finetune.models.streamed import StreamedModel
from tests.tiny import save_as_hub, tiny_dense, tiny_moe, token_ids


@pytest.mark.parametrize("kind", ["moe", "moe with a dense layer", "dense", "tied"])
@torch.no_grad()
def test_streamed_equals_whole(kind, tmp_path):
    if kind in ("dense", "tied"):
        model = tiny_dense(tie_word_embeddings=kind == "tied")
    else:
        model = tiny_moe(num_hidden_layers=3, mlp_only_layers=[1] if "dense" in kind else [])
    path = save_as_hub(model, tmp_path / "model")
    streamed = StreamedModel(Checkpoint.open(path))
    ids = token_ids(2, 9)
    hidden = [streamed.embed(row) for row in ids]
    for index in (*range(streamed.num_layers), None):
        hidden = streamed.run(streamed.model_of(index), hidden)
        streamed.clear()
    whole = load_model(path, dtype=torch.float32)(input_ids=ids).logits
    assert (torch.stack(hidden) - whole).abs().max() <= 1e-5


def test_one_layer_is_in_memory_at_a_time(tmp_path):
    streamed = StreamedModel(Checkpoint.open(save_as_hub(tiny_moe(num_hidden_layers=3), tmp_path / "model")))
    part = streamed.model_of(1)
    real = {
        name.split(".")[2] for name, parameter in part.named_parameters() if not parameter.is_meta and "layers" in name
    }
    assert real == {"1"}
    streamed.clear()
    assert all(parameter.is_meta for parameter in streamed.model_of(None).model.layers.parameters())


UP = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (UP, None, r"experts\.3\.up_proj.*is missing"),
        ("model.layers.0.extra.weight", torch.ones(2), "has no place"),
        ("model.layers.0.mlp.gate.weight", torch.ones(2, 2), "does not fit its config"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(tmp_path, name, value, message):
    from safetensors.torch import load_file, save_file

    path = save_as_hub(tiny_moe(), tmp_path / "model", shards=1)
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        StreamedModel(Checkpoint.open(path)).model_of(0)
