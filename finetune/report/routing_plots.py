"""Heatmaps of routing, experts x layers: what the data uses, what trains, and what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.errors import Problem, UserError
from finetune.report.plots import need
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import RoutingProfile, load_share


def plot_profile(profile: RoutingProfile, plan: ExpertPlan | None = None, title: str = "") -> Any:
    """Load of every expert, hottest first in each layer, the experts of `plan` marked. Returns a Figure."""
    need("matplotlib")
    from matplotlib.figure import Figure

    share_LE = load_share(profile.token_counts_LE)
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    figure = Figure(figsize=(9, 1.5 + 0.16 * profile.num_layers), layout="constrained")
    axes = figure.subplots()
    _heatmap(
        figure, axes, np.take_along_axis(share_LE, order_LE, axis=1) * profile.num_experts, "viridis", "times even"
    )
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
    from matplotlib.figure import Figure

    looks = [row for row in rows if "routing" in row]
    if not looks:
        hint = "train a mixture-of-experts model; a dense one has no router"
        raise UserError(Problem("metrics.jsonl", "holds nothing about routing", hint))
    before, after = (np.array(look["routing"]["probe_load"]) for look in (looks[0], looks[-1]))
    num_layers, num_experts = before.shape
    figure = Figure(figsize=(10, 4.2 + 0.3 * num_layers), layout="constrained")
    grid: dict[str, Any] = figure.subplot_mosaic([["before", "after", "difference"], ["drift"] * 3])
    most = float(max(before.max(), after.max())) * num_experts
    for name, values in (("before", before), ("after", after)):
        _heatmap(figure, grid[name], values * num_experts, "viridis", "times even", (0.0, most))
    change = (after - before) * num_experts
    reach = float(np.abs(change).max()) or 1.0
    _heatmap(figure, grid["difference"], change, "RdBu_r", "times even", (-reach, reach))
    for name in ("before", "after", "difference"):
        grid[name].set_title(name if name == "difference" else f"{name} training", loc="left")
        grid[name].set_xlabel("expert")
    grid["before"].set_ylabel("layer")
    _drift(grid["drift"], looks)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def _drift(axes: Any, looks: list[dict[str, Any]]) -> None:
    steps = [look["step"] for look in looks]
    for row, layer in enumerate(looks[0]["routing"]["layers"]):
        values = [look["routing"]["overlap"][row] for look in looks]
        axes.plot(steps, values, linewidth=0.8, alpha=0.6, label=f"layer {layer}")
    axes.plot(steps, [look["router_overlap"] for look in looks], color="black", linewidth=2, label="mean")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("choices as the base model's")
    axes.spines[["top", "right"]].set_visible(False)
    if len(looks[0]["routing"]["layers"]) <= 8:
        axes.legend(frameon=False, ncols=5)


def _heatmap(
    figure: Any,
    axes: Any,
    values: Any,
    colors: str,
    label: str,
    limits: tuple[float | None, float | None] = (0.0, None),
) -> None:
    image = axes.imshow(values, aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label)
