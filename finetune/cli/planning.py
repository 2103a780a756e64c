"""What a run will take: `finetune plan`, and `finetune check --plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.completion import complete_card
from finetune.cli.options import AsJson, Overrides, RecipePath
from finetune.cli.printing import open_console, print_json

if TYPE_CHECKING:
    from finetune.config.schema import Recipe
    from finetune.planning.changes import Remedy
    from finetune.planning.device import Device
    from finetune.planning.plan import Plan

Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="CARD", help="a card, such as h200 or rtx-4090", autocompletion=complete_card),
]
GpuGib = Annotated[float | None, typer.Option("--gpu-gib", min=1.0, help="or a card's memory in GiB")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="how many of them; each holds the whole model")]
Price = Annotated[float | None, typer.Option("--price", min=0.0, help="of one of them for an hour, in any currency")]


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Gpu = None,
    gpu_gib: GpuGib = None,
    gpus: Gpus = None,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take before it is paid for.

    Memory by what holds it, steps, hours, money, disk, and what would make it fit; reads config.json alone. For this
    machine unless a card is named.
    """
    from finetune.config.load import load_recipe

    made = make_plan(load_recipe(recipe, *(overrides or ())), named_device(gpu, gpu_gib, gpus), price)
    if as_json:
        print_json(made.to_dict())
    else:
        made.print()


@dataclass(frozen=True)
class Planned:
    """A plan and what would make it fit."""

    plan: Plan
    remedies: list[Remedy]

    def to_dict(self) -> dict[str, Any]:
        """Facts for `--json`."""
        return {**self.plan.to_dict(), "remedies": [remedy.to_dict() for remedy in self.remedies]}

    def print(self) -> None:
        """As tables."""
        from finetune.reports.plan_table import render_plan

        open_console().print(render_plan(self.plan, self.remedies))


def make_plan(recipe: Recipe, device: Device | None = None, price: float | None = None) -> Planned:
    """The plan of a recipe; for this machine when `device` is None."""
    from finetune.models.hub_config import find_shape
    from finetune.planning.changes import remedies
    from finetune.planning.device import this_machine
    from finetune.planning.plan import plan_run

    path = recipe.model.path
    shape, local = find_shape(path, recipe.model.revision), Path(path).is_dir()
    made = plan_run(recipe, shape, device or this_machine(), local=local, price_per_hour=price)
    return Planned(made, remedies(made))


def named_device(gpu: str | None, gpu_gib: float | None, gpus: int | None = None) -> Device:
    """What `--gpu`, `--gpu-gib` and `--gpus` say; this machine without them."""
    from finetune.planning.device import card_named, card_of_size, this_machine

    if gpu is not None and gpu_gib is not None:
        raise typer.BadParameter("give a card or its memory, not both", param_hint="--gpu-gib")
    if gpu is not None:
        return card_named(gpu, gpus or 1)
    return card_of_size(gpu_gib, gpus or 1) if gpu_gib is not None else this_machine(gpus)
