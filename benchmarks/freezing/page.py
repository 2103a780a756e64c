"""The page of results: best learning rate per arm, paired differences with bootstrap intervals, curves."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from arms import ARMS, EQUAL, HOT, RANDOM

Result = dict[str, Any]
MATCHED = 0.9
DRAWS = 10_000
ENOUGH = 8


def write_page(results: list[Result], path: Path) -> None:
    """Markdown, JSON and, where matplotlib is there, plots beside one another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = sorted({(r["base"], r["replay"], r["steps"]) for r in results})
    lines = [
        "# Which experts should train?",
        "",
        f"{date.today().isoformat()}, torch {torch.__version__}, {platform.machine()}, one thread. New skill: a secret",
        "code, 0 % before. Old: held-out rows of the base's 12 domains. Exact match, greedy. `+-` is the standard",
        "deviation over seeds. Other work on the machine is in the step times. Below 8 seeds, intervals are hints.",
        "Made by `python benchmarks/freezing/study.py`.",
    ]
    summary = []
    for base, replay, steps in settings:
        here = [r for r in results if (r["base"], r["replay"], r["steps"]) == (base, replay, steps)]
        arms = best_rates(here)
        lines += ["", f"## {Path(base).name}, {'with' if replay else 'without'} replay, {steps} steps", ""]
        lines += [*table(arms), "", *comparisons(arms)]
        summary.append({"base": base, "replay": replay, "steps": steps, "arms": arms})
        plot(arms, path.with_name(f"{path.name}-{Path(base).name}-{'replay' if replay else 'no-replay'}-{steps}.png"))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def best_rates(results: list[Result]) -> dict[str, list[Result]]:
    """By arm, its trials at the learning rate whose mean new skill over the whole curve is best, by seed."""
    by_arm: dict[str, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_arm[result["arm"]][result["rate"]].append(result)
    best = {}
    for arm in (arm.name for arm in ARMS if arm.name in by_arm):
        rates = by_arm[arm]
        most = max(len(trials) for trials in rates.values())
        full = {rate: trials for rate, trials in rates.items() if len(trials) == most}
        rate = max(full, key=lambda rate: mean(_area(trial) for trial in full[rate]))
        best[arm] = sorted(full[rate], key=lambda trial: trial["seed"])
    return best


def _area(trial: Result) -> float:
    return mean(point[1] for point in trial["curve"])


def forgetting(trial: Result) -> float:
    """Old skill lost at the end."""
    return trial["curve"][0][2] - trial["curve"][-1][2]


def matched_forgetting(trial: Result) -> float | None:
    """Old skill lost when the new one first reached MATCHED, between measured steps in proportion."""
    start, before = trial["curve"][0][2], trial["curve"][0]
    for point in trial["curve"][1:]:
        if point[1] >= MATCHED:
            part = (MATCHED - before[1]) / (point[1] - before[1])
            return start - (before[2] + part * (point[2] - before[2]))
        before = point
    return None


def table(arms: dict[str, list[Result]]) -> list[str]:
    """One row per arm."""
    lines = [
        "| arm | rate | seeds | new skill | forgotten | forgotten at 90 % | parameters | optimizer MB | step ms "
        "| routing share | old routing kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, trials in arms.items():
        new = [trial["curve"][-1][1] for trial in trials]
        matched = [value for trial in trials if (value := matched_forgetting(trial)) is not None]
        cells = [
            name,
            f"{trials[0]['rate']:g}",
            str(len(trials)),
            _spread(new),
            _spread([forgetting(trial) for trial in trials]),
            f"{_spread(matched)} ({len(matched)} reach it)" if matched else "not reached",
            f"{trials[0]['trainable']:,}",
            f"{mean(t['optimizer_bytes'] for t in trials) / 1e6:.2f}",
            f"{mean(t['step_ms'] for t in trials):.0f}",
            f"{mean(t['routing_share'] for t in trials):.2f}",
            f"{mean(t['old_overlap'] for t in trials):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comparisons(arms: dict[str, list[Result]]) -> list[str]:
    """The differences that matter, paired by seed, with 95 % bootstrap intervals."""
    lines = []
    measures = {
        "new skill, mean over the curve": _area,
        "new skill at the end": lambda trial: trial["curve"][-1][1],
        "forgotten at the end": forgetting,
    }
    for other in (EQUAL, RANDOM, "all experts"):
        if HOT not in arms or other not in arms:
            continue
        mine, theirs = ({trial["seed"]: trial for trial in arms[name]} for name in (HOT, other))
        seeds = sorted(mine.keys() & theirs.keys())
        for name, measure in measures.items():
            differences = np.array([measure(mine[seed]) - measure(theirs[seed]) for seed in seeds])
            low, high = bootstrap(differences)
            verdict = "within noise" if low <= 0 <= high else "hot higher" if low > 0 else "hot lower"
            verdict += "" if len(seeds) >= ENOUGH else ", few seeds"
            lines.append(
                f"- {HOT} - {other}, {name}: {differences.mean():+.3f} [{low:+.3f}, {high:+.3f}], "
                f"{len(seeds)} seeds: {verdict}"
            )
    return lines


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean."""
    draws = np.random.default_rng(0).choice(differences, (DRAWS, len(differences)))
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def plot(arms: dict[str, list[Result]], path: Path) -> None:
    """New and old skill against steps, mean over seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, column, title in zip(figure.subplots(1, 2), (1, 2), ("new skill", "old domains"), strict=True):
        for name, trials in arms.items():
            curves = np.array([[point[column] for point in trial["curve"]] for trial in trials])
            axes.plot([point[0] for point in trials[0]["curve"]], curves.mean(axis=0), marker=".", label=name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("optimizer step")
        axes.set_ylim(-0.02, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("exact match")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _spread(values: list[float]) -> str:
    spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"
