"""Heatmaps of routing, experts x layers: what the data uses, what trains, and what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.errors import Problem, UserError
from finetune.reports.plots import need
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile, load_share

LOAD = "load, 1 if even"


def plot_profile(profile: RoutingProfile, plan: ExpertPlan | None = None, title: str = "") -> Any:
    """Load of every expert, hottest first in each layer, the experts of `plan` marked. Returns a Figure."""
    need("matplotlib")
    from finetune.reports.figure import Plot

    share_LE = load_share(profile.token_counts_LE)
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    figure = Plot(figsize=(9, 1.5 + 0.16 * profile.num_layers), layout="constrained")
    axes = figure.subplots()
    sorted_LE = np.take_along_axis(share_LE, order_LE, axis=1) * profile.num_experts
    image = _heatmap(axes, sorted_LE, profile.layer_indices, (0.0, None))
    figure.colorbar(image, ax=axes, label=LOAD)
    if plan is not None:
        for row, layer in enumerate(profile.layer_indices):
            ranks = np.flatnonzero(np.isin(order_LE[row], plan.experts_by_layer.get(layer, ())))
            axes.plot(ranks, np.full(len(ranks), row), ".", color="white", markersize=3)
    axes.set_xlabel("experts, hottest first" + ("; dots train" if plan is not None else ""))
    axes.set_ylabel("layer")
    axes.set_title(title or f"routing of {profile.num_tokens:,} tokens", loc="left")
    return figure


def plot_routing(rows: Sequence[dict[str, Any]], title: str = "") -> Any:
    """From the rows of metrics.jsonl: load on the probe rows before and after, their difference, and drift.

    Returns a matplotlib Figure. Raises UserError when the run trained no experts' model.
    """
    need("matplotlib")
    from finetune.reports.figure import Plot

    looks = [row for row in rows if "routing" in row]
    if not looks:
        hint = "train a mixture-of-experts model; a dense one has no router"
        raise UserError(Problem("metrics.jsonl", "holds nothing about routing", hint))
    layers = looks[0]["routing"]["layers"]
    before, after = (np.array(look["routing"]["probe_load"]) for look in (looks[0], looks[-1]))
    before, after = before * before.shape[1], after * after.shape[1]
    heights = 2.0 + 0.13 * len(layers), 2.4
    figure = Plot(figsize=(11, sum(heights)), layout="constrained")
    rows_of_plots = [["before", "after", "difference"], ["drift"] * 3]
    grid: dict[str, Any] = figure.subplot_mosaic(rows_of_plots, height_ratios=heights)
    most = float(max(before.max(), after.max()))
    for name, values in (("before", before), ("after", after)):
        image = _heatmap(grid[name], values, layers, (0.0, most))
    figure.colorbar(image, ax=[grid["before"], grid["after"]], label=LOAD, aspect=30, pad=0.01)
    reach = float(np.abs(after - before).max()) or 1.0
    image = _heatmap(grid["difference"], after - before, layers, (-reach, reach), "RdBu_r")
    figure.colorbar(image, ax=grid["difference"], label="change of the load", aspect=30)
    for name in ("before", "after", "difference"):
        grid[name].set_title(name if name == "difference" else f"{name} training", loc="left")
        grid[name].set_xlabel("expert")
    grid["before"].set_ylabel("layer")
    _drift(grid["drift"], looks)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def _drift(axes: Any, looks: list[dict[str, Any]]) -> None:
    """Overlap with the base model's choices: of every layer, dark to light with depth, and the mean."""
    from matplotlib import colormaps, rcParams

    steps, layers, shades = [look["step"] for look in looks], looks[0]["routing"]["layers"], colormaps["plasma"]
    for row, layer in enumerate(layers):
        values = [look["routing"]["overlap"][row] for look in looks]
        labelled = len(layers) <= 8 or row in (0, len(layers) - 1)
        color = shades(0.3 + 0.5 * row / max(len(layers) - 1, 1))
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.8, label=f"layer {layer}" if labelled else None)
    axes.plot(
        steps, [look["router_overlap"] for look in looks], color=rcParams["text.color"], linewidth=2, label="mean"
    )
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("choices as\nthe base model's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="best")


def _heatmap(
    axes: Any, values_LE: Any, layers: Sequence[int], limits: tuple[float, float | None], colors: str = "viridis"
) -> Any:
    image = axes.imshow(values_LE, aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    some = range(0, len(layers), -(-len(layers) // 12))
    axes.set_yticks(some, [layers[row] for row in some])
    return image
