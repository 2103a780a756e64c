"""Opening a run's folder and summing it up."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finetune.adapters.trainable import trainable_parameters
from finetune.config.load import load_recipe, recipe_to_yaml
from finetune.config.schema import Recipe
from finetune.config.steps import FEW
from finetune.errors import Problem, UserError
from finetune.models.files import write_json_atomic
from finetune.quant.experts import count_weights
from finetune.routing.plan_file import read_plan
from finetune.training.checkpoints import newest_complete, set_damaged_aside
from finetune.training.evaluation import Evaluations
from finetune.training.processes import is_main_process, on_main_process
from finetune.training.provenance import library_versions
from finetune.training.run_folder import RunFolder
from finetune.training.run_lock import owned

MAY_CHANGE = {
    ("data", "cache"),
    ("data", "workers"),
    ("output", "dir"),
    ("quantize", "resident"),
    ("train", "batch_size"),
    ("train", "gradient_accumulation"),
    ("train", "keep"),
    ("train", "plan"),
    ("train", "log_every"),
    ("train", "save_every"),
    ("train", "eval_every"),
    ("train", "samples"),
    ("train", "report_to"),
}
"""The rows of a step may be shared out anew, and `provenance.check_same` refuses another number of them."""

MOVED = 0.01
"""A loss that changes by a smaller part did not move."""


@contextmanager
def open_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """The folder of the run, made anew or, to resume, checked to hold the same recipe; no other run inside.

    Raises UserError for a recipe that this machine cannot run, a folder that is taken, or one to resume that is not.
    """
    if recipe.train.activation_offload and not torch.accelerator.is_available():
        hint = "remove the line; on a CPU activations are in host memory already"
        raise UserError(Problem("train.activation_offload", "is true, but there is no GPU here", hint))
    folder = RunFolder(Path(recipe.output.dir))
    with ExitStack() as stack:

        def start() -> None:
            if resume:
                _check_same_recipe(recipe, folder)
            else:
                folder.check_free(overwrite=overwrite)
                folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owned(folder.path))
            if resume:
                set_damaged_aside(folder.checkpoints)
                newest_complete(folder.checkpoints)  # before anything else that a run killed early does not have
            else:
                folder.start(header() + recipe_to_yaml(recipe), overwrite=overwrite)

        on_main_process(start)
        yield folder


def header() -> str:
    """Comment lines with the versions that make the numbers."""
    return "".join(f"# {name} {version}\n" for name, version in library_versions().items())


def _check_same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """A resumed run must be the run that was started."""
    if not folder.recipe.is_file():
        raise UserError(Problem(str(folder.path), "holds no run to resume", "run without --resume first"))
    hint = (
        "give the recipe and overrides the run was started with, or start anew without --resume; "
        "`finetune resume RUN train.steps=N output.dir=NEW` takes more steps"
    )
    if problems := differences(load_recipe(folder.recipe, check_files=False), recipe, MAY_CHANGE, hint):
        raise UserError(*problems)


def differences(before: Recipe, now: Recipe, may_change: Set[tuple[str, str]], hint: str) -> list[Problem]:
    """Fields that differ though they may not."""
    then, new = before.model_dump(), now.model_dump()
    return [
        Problem(f"{section}.{field}", f"was {then[section][field]!r} when the run started", hint, new[section][field])
        for section in new
        for field in new[section]
        if (section, field) not in may_change and new[section][field] != then[section][field]
    ]


def summarize(recipe: Recipe, folder: RunFolder, model: PeftModel, planned_gib: float | None = None) -> dict[str, Any]:
    """What came of a run, also written to summary.json. planned_gib: what its peak was thought to be."""
    rows = folder.read_metrics()
    steps = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    base = next((row for row in evals if row["step"] == 0), None)
    best = Evaluations(recipe.train, rows).best
    first_steps = [row["seconds_to_first_step"] for row in steps if "seconds_to_first_step" in row]
    summary: dict[str, Any] = {
        "run": str(folder.path),
        "adapter": str(folder.adapter),
        "steps": steps[-1]["step"],
        "train_loss_first": steps[0]["loss"],
        "train_loss_last": steps[-1]["loss"],
        "eval_before": None if base is None else _scores(base),
        "eval": _scores(best or evals[-1]) if evals else None,
        "best_step": None if best is None else best["step"],
        "trainable_parameters": trainable_parameters(model),
        "trainable_share": trainable_parameters(model) / count_weights(model),
        "seconds": steps[-1]["elapsed_s"],
        "seconds_to_first_step": first_steps[-1] if first_steps else None,
        "tokens_per_second": steps[-1]["tokens_per_second"],
        "peak_memory_gib": max(row.get("peak_memory_gib", 0.0) for row in steps),
        "planned_memory_gib": planned_gib,
    }
    summary["warnings"] = _warnings([row["loss"] for row in steps])
    if base is not None and len(evals) > 1 and summary["eval"]["loss"] >= base["eval_loss"]:
        summary["warnings"].append(
            f"the held-out loss is not better than before training, {summary['eval']['loss']:.4f} against "
            f"{base['eval_loss']:.4f}: train fewer steps (train.keep_best=loss), or look at data.eval"
        )
    if folder.plan.is_file():
        summary["trained_experts"] = read_plan(folder.plan).num_trained
    if is_main_process():
        write_json_atomic(folder.summary, summary)
    return summary


def _scores(row: dict[str, Any]) -> dict[str, float]:
    """Figures of held-out rows in a row of metrics."""
    return {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}


def _warnings(losses: list[float]) -> list[str]:
    """A loss that did not move, by the means of the first and the last quarter of what was logged."""
    quarter = max(len(losses) // 4, 1)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    rose = len(losses) >= FEW and last > (1 + MOVED) * first
    if len(losses) < 2 or not (rose or abs(last - first) < MOVED * first):
        return []
    how = "rose" if rose else "did not move"
    remedy = "lower train.learning_rate" if rose else "take more steps or a higher train.learning_rate"
    return [f"the loss {how}, from {first:.4f} to {last:.4f}: {remedy}, or see what is trained with `finetune prepare`"]
