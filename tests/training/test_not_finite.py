"""A loss that is not finite: whose fault it is."""

import torch

from finetune.training.callbacks import not_finite
from tests.adapters.models import adapted


def test_a_damaged_base_is_not_blamed_on_the_learning_rate():
    model, nan = adapted(), float("nan")
    assert "train.learning_rate" in not_finite(model, 3, nan).hint
    names = ("model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.q_norm.weight")
    weights = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()
    }
    for name in names:
        with torch.no_grad():
            before = weights[name].clone()
            weights[name].view(-1)[-1] = nan
        problem = not_finite(model, 3, nan)
        assert problem.what == f"the loss is not finite, for the base's {name} is not"
        assert "copy or download its checkpoint again" in problem.hint
        with torch.no_grad():
            weights[name].copy_(before)


def test_a_factor_that_is_not_finite_is_no_damage_of_the_base():
    model = adapted()
    trained = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        trained.fill_(float("nan"))
    assert "train.learning_rate" in not_finite(model, 3, float("nan")).hint
