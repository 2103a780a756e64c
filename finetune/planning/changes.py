"""The cheapest changes to a recipe that make its run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from finetune.config.checks import text_findings
from finetune.config.packed_folder import read_packed_settings
from finetune.config.schema import Recipe
from finetune.errors import Problem, UserError
from finetune.planning.plan import Plan, plan_run

MOST_TOGETHER, SHOWN = 4, 3


@dataclass(frozen=True)
class Change:
    """Fields to set, and what that costs.

    price: by which changes are compared: about the time it adds, more where the result is another model.
    """

    fields: dict[str, Any]
    costs: str
    price: float

    @property
    def overrides(self) -> list[str]:
        """As the command line takes them."""
        return [f"{name}={str(value).lower()}" for name, value in self.fields.items()]


@dataclass(frozen=True)
class Remedy:
    """Changes that together make a run fit, and its peak with them."""

    changes: tuple[Change, ...]
    peak_gib: float

    @property
    def overrides(self) -> list[str]:
        """Of all of them."""
        return [override for change in self.changes for override in change.overrides]

    @property
    def costs(self) -> str:
        """Of all of them."""
        return "; ".join(change.costs for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Facts that `json.dumps` takes."""
        return {"overrides": self.overrides, "costs": self.costs, "peak_gib": round(self.peak_gib, 3)}


def remedies(plan: Plan) -> list[Remedy]:
    """The three cheapest, none of which holds another; empty for a run that fits, or one that nothing here helps."""
    if plan.verdict not in ("does not fit", "tight"):
        return []
    found: list[Remedy] = []
    changes = list(_changes(plan))
    for together in sorted(_sets(changes), key=lambda chosen: sum(change.price for change in chosen)):
        if any(set(map(id, remedy.changes)) <= set(map(id, together)) for remedy in found):
            continue
        recipe = _changed(plan.recipe, together)
        if recipe is None:
            continue
        changed = plan_run(recipe, plan.shape, plan.device)
        if changed.verdict == "fits":
            found.append(Remedy(together, changed.peak_gib))
        if len(found) == SHOWN:
            break
    return found


def refuse_hopeless(plan: Plan) -> None:
    """Raises UserError for a run that is hopeless on its device."""
    if not plan.is_hopeless:
        return
    assert plan.device.memory_gib is not None
    cures = remedies(plan)
    smaller = f"make it smaller, such as with {' '.join(cures[0].overrides)}" if cures else "take a smaller model"
    what = f"would need about {plan.peak_gib:.0f} GiB, and {plan.device.title} has {plan.device.memory_gib:.1f}"
    hint = f"{smaller}; finetune plan shows what takes it, and train.plan=off tries it all the same"
    raise UserError(Problem("memory", what, hint))


def _sets(changes: list[Change]) -> Iterator[tuple[Change, ...]]:
    for size in range(1, MOST_TOGETHER + 1):
        for chosen in combinations(changes, size):
            names = [name for change in chosen for name in change.fields]
            if len(names) == len(set(names)):
                yield chosen


def _changed(recipe: Recipe, changes: tuple[Change, ...]) -> Recipe | None:
    """The recipe with changes; None where its fields would contradict one another."""
    content = recipe.model_dump(exclude_unset=True)
    for change in changes:
        for name, value in change.fields.items():
            section, _, field = name.partition(".")
            where = content.setdefault(section, {})
            if "." in field:
                outer, _, field = field.partition(".")
                where[outer] = {}
                where = where[outer]
            where[field] = value
    changed = Recipe.model_validate(content)
    return None if text_findings(changed) else changed


def _changes(plan: Plan) -> Iterator[Change]:
    recipe, shape = plan.recipe, plan.shape
    train, adapter = recipe.train, recipe.adapter
    if train.batch_size > 1:
        fields = {
            "train.batch_size": 1,
            "train.gradient_accumulation": train.gradient_accumulation * train.batch_size,
        }
        yield Change(fields, "the same steps in smaller parts, somewhat slower", 0.1)
    if train.optimizer in ("adamw", "paged_adamw"):
        name = train.optimizer + "_8bit"
        yield Change({"train.optimizer": name}, "the optimizer's state in 8 bit", 0.05)
    where = "train.gradient_checkpointing"
    if train.gradient_checkpointing == "off":
        yield Change({where: "selective"}, "a tenth more time", 0.1)
    if train.gradient_checkpointing != "full":
        yield Change({where: "full"}, "a third to a half more time", 0.4)
    if plan.device.is_gpu and not train.activation_offload and train.gradient_checkpointing != "off":
        yield Change({"train.activation_offload": True}, "transfers to host memory", 0.35)
    if recipe.quantize.scheme == "none" and read_packed_settings(recipe.model.path) is None:
        yield Change({"quantize.scheme": "nf4"}, "weights rounded to 4 bit, 5 to 40 % more time", 0.3)
        if shape.moe_layers:
            yield Change({"quantize.scheme": "fp8"}, "experts rounded to 8 bit, 10 to 40 % more time", 0.28)
    if adapter.experts and recipe.experts.mode == "lora" and adapter.rank_of_experts > 4:
        rank = max(4, adapter.rank_of_experts // shape.experts_per_token)
        yield Change({"adapter.expert_rank": rank}, f"rank {rank} instead of {adapter.rank_of_experts} on experts", 0.5)
    if adapter.experts and recipe.experts.select is None:
        yield Change({"experts.select.top_fraction": 0.25}, "a quarter of the experts train", 0.6)
    if recipe.data.max_length >= 1024:
        half = recipe.data.max_length // 2
        yield Change({"data.max_length": half}, "rows longer than that are an error, see data.over_long", 1.0)
