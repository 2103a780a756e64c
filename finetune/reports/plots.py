"""Plots of a run, for notebooks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.errors import Problem, UserError


def metrics_frame(rows: Sequence[dict[str, Any]]) -> Any:
    """`metrics.jsonl` as a pandas DataFrame, one row per step, evaluation columns beside the training ones.

    What is there by layer (`routing`, `reselected`) is left out, see `report.routing_plots`.
    """
    pandas = need("pandas")
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        flat = {name: value for name, value in row.items() if name not in ("routing", "reselected", "warnings")}
        by_step.setdefault(row["step"], {}).update(flat)
    return pandas.DataFrame([by_step[step] for step in sorted(by_step)])


def plot_loss(rows: Sequence[dict[str, Any]], title: str = "") -> Any:
    """Training loss against steps, and held-out loss where it was measured. Returns a matplotlib Figure."""
    need("matplotlib")
    from finetune.reports.figure import Plot

    figure = Plot(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9bb8d3", linewidth=1, label="training, each logged step")
        axes.plot(steps, smooth(losses), color="#1f5a92", linewidth=2, label="training, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="#c8553d", marker="o", linewidth=1.5, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left")
    return figure


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull towards the first value."""
    smoothed, average, mass = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(average / mass)
    return smoothed


def need(library: str) -> Any:
    """An optional library. Raises UserError that says how to get it."""
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError:
        hint = "pip install 'finetune-moe[notebook]'"
        raise UserError(Problem("report", f"{library} is not installed", hint)) from None
