"""Lengths and scripts of a set of rows as a figure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from finetune.reports.figure import Plot
from finetune.reports.tables import percent

MOST_SCRIPTS = 8
_BLUE, _RED = "#1f5a92", "#c8553d"


def plot_data(facts: dict[str, Any]) -> Plot:
    """Rows by their tokens on the left, with the limit; scripts on the right, where there are several.

    facts: as `DataReport.to_dict` gives them.
    """
    several = len(facts["scripts"]) > 1
    figure = Plot(figsize=(9 if several else 6, 3), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(3, 2)) if several else [figure.subplots()]
    _plot_lengths(axes[0], facts)
    if several:
        _plot_scripts(axes[1], facts["scripts"])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    return figure


def _plot_lengths(axes: Any, facts: dict[str, Any]) -> None:
    edges, counts, limit = facts["lengths"]["edges"], facts["lengths"]["counts"], facts["max_length"]
    colors = [_RED if low > limit else _BLUE for low in edges[:-1]]
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", color=colors, edgecolor="white", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    if edges[0] / 4 <= limit <= edges[-1] * 4:
        axes.axvline(limit, color=_RED, linewidth=1, linestyle="--")
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        place = {"transform": axes.get_xaxis_transform(), "va": "top", "ha": "left", "bbox": box}
        axes.text(limit * 1.05, 0.98, f"limit {limit:,}", color=_RED, **place)
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("Lengths", loc="left")


def _plot_scripts(axes: Any, scripts: dict[str, float]) -> None:
    shown = list(scripts.items())[:MOST_SCRIPTS]
    names, values = [name for name, _ in shown], [100 * share for _, share in shown]
    bars = axes.barh(names, values, color=_BLUE, height=0.65)
    axes.bar_label(bars, [percent(share, 1.0) for _, share in shown], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 125)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("Scripts, of all letters", loc="left")
