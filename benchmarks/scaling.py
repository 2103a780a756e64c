"""How the cost of expert LoRA grows with tokens, experts, rank and the share of experts that are trained.

    python benchmarks/scaling.py                    half of Qwen3-30B-A3B's width and half its experts
    python benchmarks/scaling.py --shape tiny
    python benchmarks/scaling.py --save scaling     also writes results/DATE-scaling.md, .json and .png

One thing is varied at a time around one layer; forward and backward of the layer frozen, of ours, and of stock PEFT,
measured as in expert_lora.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from expert_lora import measure
from layers import LAYERS, SHAPES, Shape
from results import GIB, save, table

CENTERS = {"half": Shape(512, 64, 1024, 384, 8, 16), "tiny": SHAPES["tiny"]}
SWEEPS: dict[str, dict[str, list[Any]]] = {
    "half": {
        "tokens": [1, 8, 64, 256, 1024, 4096],
        "experts": [8, 16, 32, 64, 128],
        "rank": [4, 8, 16, 32, 64, 128],
        "trained_share": [0.02, 0.1, 0.25, 0.5, 1.0],
    },
    "tiny": {
        "tokens": [1, 8, 64, 256, 1024, 4096],
        "experts": [4, 8, 16, 32, 64],
        "rank": [4, 8, 16, 32],
        "trained_share": [0.05, 0.1, 0.25, 0.5, 1.0],
    },
}
LABELS = {
    "tokens": "tokens",
    "experts": "experts",
    "rank": "rank",
    "trained_share": "share of experts trained",
}
COLORS = {"frozen": "#8a8f98", "ours": "#1f5a92", "stock": "#c8553d"}


def sweep(center: Shape, values: dict[str, list[Any]], names: list[str], options: Any) -> dict[str, list[Any]]:
    """Every case of every varied field."""
    found: dict[str, list[Any]] = {}
    for field, points in values.items():
        found[field] = []
        for value in points:
            case = measure(
                replace(center, **{field: value}), names, rounds=options.rounds, threads=options.threads, backend="auto"
            )
            del case["seconds"]
            found[field].append(case)
            ours = case["contestants"]["ours"]
            print(
                f"{field} {value}: {1e3 * ours['median_s']:.1f} ms, {ours['time_over_frozen']:.2f} x frozen", flush=True
            )
    return found


def render(found: dict[str, list[Any]]) -> str:
    """One Markdown table per varied field."""
    parts = []
    for field, cases in found.items():
        names = list(cases[0]["contestants"])
        header = [
            LABELS[field],
            *(f"{n} ms" for n in names),
            *(f"ours / {n}" for n in names if n != "ours"),
            *(f"{n} extra GiB" for n in names),
        ]
        rows = []
        for case in cases:
            each = case["contestants"]
            ratios = [each["ours"][f"time_over_{n}"] for n in names if n != "ours"]
            memory = [each[n]["extra_peak_bytes"] / GIB for n in names]
            rows.append([str(case["shape"][field]), *(1e3 * each[n]["median_s"] for n in names), *ratios, *memory])
        parts.append(table(header, rows))
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, list[Any]], path: Path) -> None:
    """Milliseconds against each varied field, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (field, cases) in zip(panels, found.items(), strict=True):
        x = [case["shape"][field] for case in cases]
        for name in cases[0]["contestants"]:
            y = [1e3 * case["contestants"][name]["median_s"] for case in cases]
            axes.plot(x, y, marker="o", color=COLORS[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel(LABELS[field])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward (ms)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CENTERS, default="half", help="the layer in the middle")
    parser.add_argument("--vary", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--only", nargs="+", choices=LAYERS, default=["frozen", "ours", "stock"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", metavar="NAME", help="write results/DATE-NAME.md, .json and .png")
    options = parser.parse_args()
    if not {"frozen", "ours"} <= set(options.only):
        parser.error("--only must name frozen and ours")
    values = {field: SWEEPS[options.shape][field] for field in options.vary}
    found = sweep(CENTERS[options.shape], values, options.only, options)
    print(json.dumps(found) if options.json else render(found))
    if options.save:
        paths = save(options.save, "How the cost of expert LoRA grows", {"cases": found}, render(found))
        plot(found, paths[0].with_suffix(".png"))
        print("\n".join(map(str, paths)), file=sys.stderr)


if __name__ == "__main__":
    main()
