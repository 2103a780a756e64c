"""Which experts a run trains: chosen once, before adapters are attached, and written down in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.files import adapter_folder, read_sidecar
from finetune.config.schema import Recipe
from finetune.models.live import expert_width
from finetune.models.text_model import text_config
from finetune.routing.expert_files import ExpertFiles
from finetune.routing.measure import profile_for
from finetune.routing.plan import ExpertPlan
from finetune.routing.plan_file import read_plan, write_plan
from finetune.routing.profile import RoutingProfile
from finetune.routing.profile_file import read_profile, write_profile
from finetune.routing.select import select
from finetune.training.checkpoints import newest_complete
from finetune.training.processes import is_main_process, processes
from finetune.training.run_folder import RunFolder


@dataclass(frozen=True)
class Choice:
    """The experts that train, all of the model's when `plan` is None, and the profile they were chosen from."""

    plan: ExpertPlan | None = None
    profile: RoutingProfile | None = None


def choose_experts(
    model: nn.Module,
    rows: Any,
    recipe: Recipe,
    folder: RunFolder,
    files: ExpertFiles,
    *,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """The choice of a run, saved as routing.json and plan.json in its folder.

    A resumed run reads what it saved; where experts are chosen anew, the plan of its newest checkpoint.

    One process measures and every process reads what it wrote, so that all train the same experts.
    """
    if recipe.adapter.start is not None:
        if is_main_process() and not resume and (plan := _plan_in(recipe.adapter.start)) is not None:
            write_plan(folder.plan, plan)
        processes().wait_for_everyone()
        return Choice(read_plan(folder.plan) if folder.plan.is_file() else None)
    if recipe.experts.select is None:
        return Choice()
    with processes().main_process_first():
        if is_main_process() and not resume:
            profile = None
            if files.plan is None:
                profile = profile_for(recipe, model, rows, progress=progress)
                write_profile(folder.routing, profile)
            write_plan(folder.plan, _plan(model, recipe, files, profile))
        plan = _plan_in(newest_complete(folder.checkpoints)) if resume and recipe.experts.reselect else None
        return Choice(
            plan or read_plan(folder.plan), read_profile(folder.routing) if folder.routing.is_file() else None
        )


def _plan_in(adapter: str | Path) -> ExpertPlan | None:
    """The experts that an adapter's sidecar says it has; None where all of them have."""
    sidecar = read_sidecar(adapter_folder(adapter))
    return ExpertPlan.from_dict(sidecar["experts"]) if sidecar and sidecar.get("experts") else None


def _plan(model: Any, recipe: Recipe, files: ExpertFiles, profile: RoutingProfile | None) -> ExpertPlan:
    if profile is None:
        assert files.plan is not None
        return files.plan
    price = recipe.expert_parameters(text_config(model).hidden_size, expert_width(model))
    seed = recipe.train.seed
    rank = recipe.adapter.rank_of_experts
    return select(profile, recipe.experts, against=files.against, seed=seed, expert_parameters=price, rank=rank)
