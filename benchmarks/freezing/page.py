"""The page of results: a table of arms, paired differences with bootstrap intervals, curves."""

from __future__ import annotations

import platform
from collections import defaultdict
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from arms import ALL, ARMS, EQUAL, HOT, MANY_SEEDS, RANDOM

Result = dict[str, Any]
MATCHED = 0.9
DRAWS = 10_000
ENOUGH = 8


def write_page(results: list[Result], tuning: list[Result], path: Path) -> None:
    """Markdown and, where matplotlib is there, plots beside it."""
    lines = [
        "# Which experts should train?",
        "",
        f"{date.today().isoformat()}, torch {torch.__version__}, {platform.machine()}, one thread per trial. New",
        "skill: a secret code, 0 % before. Old: held-out rows of the base's 12 domains. Exact match, greedy. `+-` is",
        "the standard deviation over seeds. Steps were timed on a busy machine. Below 8 seeds, intervals are hints.",
        f"Made by `python benchmarks/freezing/study.py` from the trials in {path.name}.jsonl.",
    ]
    for base, replay in sorted({(r["base"], r["replay"]) for r in results}, key=lambda case: (not case[1], case[0])):
        here = [r for r in results if (r["base"], r["replay"]) == (base, replay)]
        arms, steps, told = by_arm(here), here[0]["steps"], "with" if replay else "without"
        lines += ["", f"## {Path(base).name}, {told} replay, {steps} steps", ""]
        image = path.with_name(f"{path.name}-{Path(base).name}-{told}-replay.png")
        lines += [*table(arms), "", *comparisons(arms), "", f"![new and old skill against steps]({image.name})"]
        plot(arms, image)
    if tuning:
        lines += ["", "## Learning rates", "", *rates_table(tuning)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def by_arm(results: list[Result]) -> dict[str, list[Result]]:
    """Trials of each arm by seed, arms in their order."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        found[result["arm"]].append(result)
    return {arm.name: found[arm.name] for arm in ARMS if arm.name in found}


def best_rates(tuning: list[Result]) -> dict[str, float]:
    """By arm, the learning rate whose new skill, averaged over the whole curve, is best."""
    return {arm: max(trials, key=_area)["rate"] for arm, trials in by_arm(tuning).items()}


def rates_table(tuning: list[Result]) -> list[str]:
    """What each rate gave; the chosen one in bold, with a word where it lies at the edge of the grid."""
    lines = [
        "One seed that no comparison uses, on the first base with replay. New skill, averaged over the curve; the best",
        "rate (bold) is the arm's everywhere above.",
        "",
        "| arm | rates and what they gave | best at the edge of the grid |",
        "|---|---|---|",
    ]
    for arm, trials in by_arm(tuning).items():
        tried = sorted(trials, key=lambda trial: trial["rate"])
        best = max(tried, key=_area)
        cells = [f"{t['rate']:g}: {_area(t):.3f}" for t in tried]
        cells[tried.index(best)] = f"**{cells[tried.index(best)]}**"
        edge = "yes" if best in (tried[0], tried[-1]) else ""
        lines.append(f"| {arm} | {', '.join(cells)} | {edge} |")
    return lines


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
    for other in (EQUAL, RANDOM, ALL):
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
                f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: {verdict}"
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
        for number, (name, trials) in enumerate(arms.items()):
            curves = np.array([[point[column] for point in trial["curve"]] for trial in trials])
            style = {"color": f"C{number % 8}", "linestyle": ("-", "--", ":")[number // 8]}
            style |= {"linewidth": 2.5 if name in MANY_SEEDS else 1.2, "marker": "."}
            axes.plot([point[0] for point in trials[0]["curve"]], curves.mean(axis=0), label=name, **style)
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
