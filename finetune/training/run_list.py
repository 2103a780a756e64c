"""The runs of a folder, a row of facts for each."""

from __future__ import annotations

from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.errors import Problem, UserError
from finetune.training.run_folder import RunFolder
from finetune.training.run_lock import is_owned

DEPTH = 3
"""Folders below the one that is named."""


def find_runs(folder: str | Path) -> list[RunFolder]:
    """`folder` where it is a run, and those below it. Raises UserError for one that is not there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(Problem(str(folder), "is not a folder", "give the folder that holds your runs"))
    found = chain.from_iterable(folder.glob("*/" * depth + "recipe.yaml") for depth in range(DEPTH + 1))
    return [RunFolder(file.parent) for file in sorted(found) if (file.parent / "checkpoints").is_dir()]


def describe_run(run: RunFolder, below: str | Path) -> dict[str, Any]:
    """What tells a run from others, None where it is not known; its name by its place below a folder."""
    summary, facts, rows = run.read_summary() or {}, run.read_facts(), run.read_metrics()
    steps = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    last = steps[-1] if steps else {}
    place = run.path.resolve().relative_to(Path(below).resolve())
    began = datetime.fromtimestamp(run.recipe.stat().st_mtime).isoformat(" ", "seconds")
    return {
        "name": run.path.resolve().name if place == Path() else str(place),
        "model": (facts.get("base") or {}).get("name"),
        "state": "running" if is_owned(run.path) else "finished" if summary else "stopped",
        "date": facts.get("started", began),
        "steps": last.get("step", 0),
        "loss": last.get("loss"),
        "eval_before": next((row["eval_loss"] for row in evals if row["step"] == 0), None),
        "eval_after": evals[-1]["eval_loss"] if evals and evals[-1]["step"] else None,
        "eval_best": min((row["eval_loss"] for row in evals if row["step"]), default=None),
        "tokens_per_second": last.get("tokens_per_second"),
        "peak_memory_gib": max((row["peak_memory_gib"] for row in steps if "peak_memory_gib" in row), default=None),
    }
