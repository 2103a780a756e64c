"""Plots of a run, for notebooks and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.errors import Problem, UserError

BLUE, RED, GREEN = "#3f83c4", "#d9623f", "#2f9e6e"
"""Read on white and on black alike."""
SHARES = {"exact_match": "exact match", "preference_accuracy": "prefers chosen"}
"""Scores of held-out rows from 0 to 1, with their titles."""


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
    loss.plot(steps, losses, color=BLUE, linewidth=1, alpha=0.6, label="each logged step")
    loss.plot(steps, smooth(losses, min(0.9, 1 - 4 / max(len(losses), 8))), color=BLUE, linewidth=2, label="smoothed")
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
    """Held-out loss and exact match against steps: from the base on, the best marked. Returns a Figure.

    best_step: whose checkpoint was kept; that of the lowest loss when None.
    """
    need("matplotlib")
    from finetune.reports.figure import Plot

    evals = [row for row in rows if "eval_loss" in row]
    best = next((row for row in evals if row["step"] == best_step), min(evals, key=lambda row: row["eval_loss"]))
    names = ["eval_loss", *(f"eval_{name}" for name in SHARES if all(f"eval_{name}" in row for row in evals))]
    figure = Plot(figsize=(7.6, 3.0), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        share = SHARES.get(name.removeprefix("eval_"))
        title, scale, form = ("held-out loss", 1, "{:.4g}") if share is None else (share, 100, "{:.1f} %")
        axes.plot(
            [row["step"] for row in evals],
            [row[name] * scale for row in evals],
            color=RED,
            marker="o",
            markersize=4,
            linewidth=1.6,
        )
        axes.plot(best["step"], best[name] * scale, "o", color=GREEN, markersize=9)
        axes.set_title(f"{title}: {form.format(best[name] * scale)} at step {best['step']:,}", loc="left", fontsize=11)
        axes.set_xlabel("optimizer step")
        _plain(axes)
        if share is not None:
            axes.yaxis.set_major_formatter("{x:.4g} %")
            most = max([row[name] * scale for row in evals] + [1.0])
            axes.set_ylim(-0.03 * most, 1.1 * most)
        else:
            _fit_losses(axes, evals)
    return figure


def _fit_losses(axes: Any, evals: Sequence[dict[str, Any]]) -> None:
    """Show the trained losses at full height; a base that is far above them is told at the edge."""
    base = next((row["eval_loss"] for row in evals if row["step"] == 0), None)
    trained = [row["eval_loss"] for row in evals if row["step"] > 0]
    if base is None or not trained:
        return
    spread = max(max(trained) - min(trained), 0.05 * max(trained))
    above = base > max(trained) + 2 * spread
    if above:
        axes.set_ylim(min(trained) - 0.15 * spread, max(trained) + 0.4 * spread)
    told = f"before: {base:.4g}" + (", above the scale" if above else "")
    axes.annotate(told, (0.98, 0.96), xycoords="axes fraction", ha="right", va="top")


def plot_together(runs: Mapping[str, Sequence[dict[str, Any]]], column: str) -> Any:
    """A column of metrics.jsonl of several runs against steps, a line for each. Returns a matplotlib Figure."""
    need("matplotlib")
    from matplotlib import colormaps

    from finetune.reports.figure import Plot

    figure = Plot(figsize=(7.6, 3.6), layout="constrained")
    axes, shades = figure.subplots(), colormaps["tab10"]
    for number, (name, rows) in enumerate(runs.items()):
        points = [(row["step"], row[column]) for row in rows if column in row and row["step"] > 0]
        if points:
            steps, values = zip(*points, strict=True)
            drawn = smooth(values) if column == "loss" else values
            marker = "o" if len(points) < 20 else None
            axes.plot(steps, drawn, color=shades(number % 10), marker=marker, markersize=3, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    _plain(axes)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    return figure


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
