"""The objective of a recipe."""

from __future__ import annotations

from finetune.config.schema import Recipe
from finetune.errors import Problem, UserError
from finetune.training.objectives.dpo import Dpo
from finetune.training.objectives.objective import Objective
from finetune.training.objectives.sft import Sft


def objective_of(recipe: Recipe) -> Objective:
    """What a recipe trains for. Raises UserError for an objective whose rows can be prepared, but not trained on."""
    if recipe.train.objective == "sft":
        return Sft(recipe)
    if recipe.train.objective == "dpo":
        return Dpo(recipe)
    hint = "`finetune prepare` makes its rows; sft and dpo are trained"
    raise UserError(Problem("train.objective", "cannot be trained, only prepared", hint, recipe.train.objective))
