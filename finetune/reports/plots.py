"""Plots of a run, for notebooks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.errors import Problem, UserError

BLUE, RED, GREEN, GRAY = "#3f83c4", "#d9623f", "#2f9e6e", "#8a8a8a"
"""Read on white and on black alike."""


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


def plot_training(rows: Sequence[dict[str, Any]]) -> Any:
    """Training loss over the learning rate, against steps. Returns a matplotlib Figure."""
    need("matplotlib")
    from finetune.reports.figure import Plot

    steps, losses, rates = zip(*_trained(rows), strict=True)
    figure = Plot(figsize=(7.6, 4.2), layout="constrained")
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    loss.plot(steps, losses, color=BLUE, linewidth=1, alpha=0.45, label="each logged step")
    loss.plot(steps, smooth(losses), color=BLUE, linewidth=2, label="smoothed")
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False)
    rate.plot(steps, [value or 0.0 for value in rates], color=GREEN, linewidth=1.8)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, rate):
        _plain(axes)
        axes.set_ylim(bottom=0)
    rate.set_xlabel("optimizer step")
    return figure


def plot_evaluation(rows: Sequence[dict[str, Any]], best_step: int | None = None) -> Any:
    """Held-out loss and exact match against steps: the base before step one, the best marked. Returns a Figure.

    best_step: whose checkpoint was kept; that of the lowest loss when None.
    """
    need("matplotlib")
    from finetune.reports.figure import Plot

    evals = [row for row in rows if "eval_loss" in row]
    best = next((row for row in evals if row["step"] == best_step), min(evals, key=lambda row: row["eval_loss"]))
    figure = Plot(figsize=(7.6, 3.0), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("eval_loss", "eval_exact_match"), ("held-out loss", "exact match"), strict=True
    ):
        scale, unit = (100, " %") if name == "eval_exact_match" else (1, "")
        values = [row[name] * scale for row in evals]
        axes.plot([row["step"] for row in evals], values, color=RED, marker="o", markersize=4, linewidth=1.6)
        axes.plot(best["step"], best[name] * scale, "o", color=GREEN, markersize=9, label=f"best, step {best['step']}")
        axes.set_title(f"{title}{' (%)' if unit else ''}", loc="left")
        axes.set_xlabel("optimizer step")
        _plain(axes)
        _fit_axis(axes, evals, name, scale, unit)
        axes.legend(frameon=False, loc="best")
    return figure


def _fit_axis(axes: Any, evals: Sequence[dict[str, Any]], name: str, scale: float, unit: str) -> None:
    """Show the trained scores at full height; a base that is far above them is told at the edge."""
    base = next((row[name] * scale for row in evals if row["step"] == 0), None)
    trained = [row[name] * scale for row in evals if row["step"] > 0]
    if unit:
        axes.set_ylim(bottom=-0.02 * max([*trained, base or 0.0, 1.0]))
    if base is None or not trained:
        return
    spread = max(trained) - min(trained)
    if not unit and base > max(trained) + 2 * max(spread, 0.05 * max(trained)):
        margin = 0.15 * max(spread, 0.05 * max(trained))
        top = max(trained) + 3 * margin
        axes.set_ylim(min(trained) - margin, top)
        axes.annotate(f"base: {base:.2f}, off the scale", (0, top), (6, -4), textcoords="offset points", va="top")
    else:
        axes.axhline(base, color=GRAY, linewidth=1, linestyle=":")
        axes.annotate(f"base: {base:.4g}{unit}", (1, base), (-2, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right")  # fmt: skip


def _trained(rows: Sequence[dict[str, Any]]) -> list[tuple[int, float, float | None]]:
    return [(row["step"], row["loss"], row.get("learning_rate")) for row in rows if "loss" in row]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


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
