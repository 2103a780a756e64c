"""Parameters that a recipe trains, from shapes; at most so many where what the router does decides."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.architecture.shape import ModelShape
from finetune.config.schema import Recipe
from finetune.config.values import parameters_in


@dataclass(frozen=True)
class Trained:
    """Parameters that train.

    outside: factors on attention, MLPs and routers, which autocast copies to 16 bit.
    experts: of experts.  experts_per_layer: how many of a layer's.
    at_most: whether the router's choice decides, so that these are the most it can be.
    """

    outside: int
    experts: int
    experts_per_layer: int
    at_most: bool = False

    @property
    def total(self) -> int:
        """Of all."""
        return self.outside + self.experts


def trained(recipe: Recipe, shape: ModelShape) -> Trained:
    """What `recipe` trains of a model of `shape`."""
    select, count, at_most = recipe.experts.select, shape.experts, False
    price = recipe.expert_parameters(shape.hidden, shape.expert_intermediate)
    if select is not None and select.top_fraction is not None:
        count = select.count_of(shape.experts)
    elif select is not None:
        at_most = True
    per_layer = count * price
    if (hot := recipe.experts.hot) is not None:
        rank = recipe.adapter.rank_of_experts
        per_layer += min(hot.rule.count_of(shape.experts), count) * price // rank * (hot.rank - rank)
    experts = shape.moe_layers * per_layer
    if select is not None and select.budget is not None:
        experts = min(experts, parameters_in(select.budget))
    router = {"frozen": 0, "lora": recipe.adapter.rank * (shape.hidden + shape.experts)}
    outside = recipe.adapter.parameters_outside(shape)
    outside += shape.moe_layers * router.get(recipe.router.train, shape.hidden * shape.experts)
    return Trained(outside, experts, count if recipe.adapter.experts else 0, at_most)


def active_parameters(shape: ModelShape) -> int:
    """Weights that one token is multiplied with: the chosen experts, and the head but not the embedding."""
    active = 0
    for weights in shape.weights():
        if weights.kind == "experts":
            active += weights.parameters // shape.experts * shape.experts_per_token
        elif weights.shape != (shape.vocabulary, shape.hidden):
            active += weights.parameters
    return active + shape.vocabulary * shape.hidden
