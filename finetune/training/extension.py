"""More steps for a run: a new one beside it, which goes on from its newest checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.config.load import load_recipe, recipe_to_yaml
from finetune.config.schema import Recipe
from finetune.errors import Problem, UserError
from finetune.models.files import finished_folder, write_atomic
from finetune.training.checkpoints import checkpoint_at, newest_complete, step_of
from finetune.training.evaluation import Evaluations
from finetune.training.provenance import take_over
from finetune.training.run import MAY_CHANGE, differences, header
from finetune.training.run_folder import RunFolder

MORE = {("train", "steps"), ("train", "epochs"), ("train", "patience"), ("train", "keep_best")}
"""What an extension is made for. Rates follow the schedule over all steps, as if it had been meant from the start."""


def extend(parent: RunFolder, recipe: Recipe) -> None:
    """Make `recipe.output.dir` a copy of `parent` at its newest checkpoint, ready to be resumed with more steps.

    Raises UserError when anything else changes, when there are no more steps, or when the folder is taken.
    """
    before, checkpoint = load_recipe(parent.recipe, check_files=False), newest_complete(parent.checkpoints)
    done, steps = step_of(checkpoint), recipe.train.steps
    problems = differences(before, recipe, MAY_CHANGE | MORE, "start a run of its own: adapter.from takes the weights")
    if steps is not None and steps <= done:
        what = f"is not above the {done:,} steps that {parent.path} has taken"
        problems.append(Problem("train.steps", what, "give the steps of both together", steps))
    if problems:
        raise UserError(*problems)
    best = Evaluations(recipe.train, parent.read_metrics()).best_step
    kept = {done} if best is None else {done, best}
    with finished_folder(recipe.output.dir) as building:
        folder = RunFolder(building)
        for file in (parent.routing, parent.plan, parent.metrics):
            if file.is_file():
                shutil.copyfile(file, building / file.name)
        for step in kept:
            source = checkpoint_at(parent.checkpoints, step)
            if source.is_dir():
                shutil.copytree(source, checkpoint_at(folder.checkpoints, step))
        text = f"# goes on from step {done} of {Path(parent.path).resolve().name}\n{header()}{recipe_to_yaml(recipe)}"
        write_atomic(folder.recipe, text.encode())
        take_over(parent.provenance, folder.provenance, {"run": Path(parent.path).resolve().name, "step": done})
