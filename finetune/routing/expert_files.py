"""The files that a recipe's experts section names: read, and held against the model's config.json, before it loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.architecture.shape import ModelShape, find_model_shape
from finetune.config.schema import Recipe
from finetune.errors import Problem, RoutingError
from finetune.routing.plan import ExpertPlan
from finetune.routing.plan_file import read_plan
from finetune.routing.profile import RoutingProfile
from finetune.routing.profile_file import read_profile

_REMAKE = "make it with this model"


@dataclass(frozen=True)
class ExpertFiles:
    """What a recipe names in its experts section.

    plan: of experts.select.file. against: of experts.against.
    """

    plan: ExpertPlan | None
    against: RoutingProfile | None

    @classmethod
    def read(cls, recipe: Recipe) -> ExpertFiles:
        """Raises RoutingError or AdapterError with what is wrong with them, alone or beside the rest of the recipe."""
        rule, against = recipe.experts.select, recipe.experts.against
        files = cls(
            None if rule is None or rule.file is None else read_plan(rule.file),
            None if against is None else read_profile(against),
        )
        shape = find_model_shape(recipe.model.path)
        problems = [*_ranks(files, recipe), *(_misfits(files, recipe, shape) if shape is not None else ())]
        if problems:
            raise RoutingError(*problems)
        return files


def _ranks(files: ExpertFiles, recipe: Recipe) -> Iterator[Problem]:
    """Ranks of single experts do not go with everything."""
    if files.plan is None or files.plan.ranks_by_layer is None:
        return
    assert recipe.experts.select is not None
    where = f"{recipe.experts.select.file}: expert plan: ranks_by_layer"
    if recipe.experts.reselect is not None:
        hint = "remove ranks_by_layer, or experts.reselect"
        yield Problem(where, "gives experts different ranks, which experts.reselect cannot move", hint)
    if recipe.experts.mode == "full":
        yield Problem(where, "is given, but experts.mode: full trains no factors", "remove it, or write mode: lora")


def _misfits(files: ExpertFiles, recipe: Recipe, shape: ModelShape) -> Iterator[Problem]:
    model = recipe.model.path
    if (plan := files.plan) is not None and recipe.experts.select is not None:
        where = f"{recipe.experts.select.file}: expert plan"
        if plan.num_experts != shape.experts:
            what = f"is for layers of {plan.num_experts} experts, but those of {model} have {shape.experts}"
            yield Problem(where, what, _REMAKE)
        if strange := [layer for layer in plan.experts_by_layer if layer >= shape.layers]:
            what = f"names layers that {model} does not have: it has {shape.layers}"
            yield Problem(where, what, _REMAKE, strange)
    if (profile := files.against) is not None:
        here = shape.moe_layers, shape.experts, shape.experts_per_token
        there = profile.num_layers, profile.num_experts, profile.experts_per_token
        if there != here:
            names = "layers of experts", "experts in each", "experts per token"
            unlike = ", ".join(
                f"{a} {name} instead of {b}" for a, b, name in zip(there, here, names, strict=True) if a != b
            )
            yield Problem(str(recipe.experts.against), f"is a profile of another model than {model}: {unlike}", _REMAKE)
