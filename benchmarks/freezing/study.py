"""Does it matter which experts train? The freezing study, on two base models of the embedded kind.

    python benchmarks/freezing/study.py --short     a first look: 8 arms, 3 seeds, no search for learning rates
    python benchmarks/freezing/study.py             the whole study; about an hour and a half on two cores
    python benchmarks/freezing/study.py --page      only write the page from the results there are

First every arm is tried at three learning rates, and at further ones while the best lies at the edge, on the first base
with a seed of its own; the rate that learns the new skill fastest is the arm's from then on. Then the arms run on both
bases with rows of the old domains, and on the first without: 8 seeds where the comparison matters, 3 elsewhere. A trial
that is in the file of results is not run again, so the study can be stopped and continued at any time. The second base
is pre-trained when it is not there (11 minutes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from arms import ARMS, FEW_ARMS, MANY_SEEDS, RATES, SHORT_ARMS
from page import best_rates, write_page
from trial import Trial

RESULTS = Path("benchmarks/results")
BASE, SECOND_BASE = "examples/tiny-qwen3-moe", "runs/freezing/base-seed-1"
TUNING_SEED, SEEDS, FEW_SEEDS = 0, range(1, 9), range(1, 4)
STEPS, EVERY = 240, 30
CASES = (  # base, with replay, arms
    (BASE, True, tuple(arm.name for arm in ARMS)),
    (SECOND_BASE, True, FEW_ARMS),
    (BASE, False, FEW_ARMS),
)


def short_trials() -> list[Trial]:
    """The first look."""
    arms = [arm for arm in ARMS if arm.name in SHORT_ARMS]
    return [Trial(BASE, arm.name, arm.middle_rate, seed, True, 150, 30) for seed in FEW_SEEDS for arm in arms]


def tuning_trials(results: Results) -> list[Trial]:
    """Every arm at three learning rates, and at the one beyond where the best so far lies at the edge."""
    found = []
    for arm in (arm for arm in ARMS if arm.like is None):
        middle = RATES.index(arm.middle_rate)
        low, high = middle - 1, middle + 1
        while True:
            wanted = [Trial(BASE, arm.name, rate, TUNING_SEED, True, STEPS, EVERY) for rate in RATES[low : high + 1]]
            done = results.of(wanted)
            best = RATES.index(best_rates(done)[arm.name]) if len(done) == len(wanted) else middle
            if best not in (low, high) or best in (0, len(RATES) - 1):
                break
            low, high = min(low, best - 1), max(high, best + 1)
        found += wanted
    return found


def trials(rates: dict[str, float]) -> list[Trial]:
    """The study proper, every arm at its rate; comparisons that matter first, seed by seed, for a study unfinished."""
    found = [
        Trial(base, arm.name, rates[arm.like or arm.name], seed, replay, STEPS, EVERY)
        for seed in SEEDS
        for base, replay, names in CASES
        for arm in ARMS
        if arm.name in (names if seed in FEW_SEEDS else MANY_SEEDS)
    ]
    return sorted(found, key=lambda trial: trial.arm not in MANY_SEEDS)


class Results:
    """The file of results, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    result = json.loads(line)
                except json.JSONDecodeError:  # a last line cut short by a kill
                    continue
                self.found[result["key"]] = result

    def add(self, result: dict) -> None:
        """Keeps one more."""
        self.found[result["key"]] = result
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, wanted: list[Trial]) -> list[dict]:
        """Those of `wanted` that are there."""
        return [self.found[trial.key] for trial in wanted if trial.key in self.found]


def run(wanted: list[Trial], results: Results, jobs: int, deadline: float) -> bool:
    """Runs what is missing; False when the time was up before it was done."""
    todo = [trial for trial in wanted if trial.key not in results.found]
    if any(trial.base == SECOND_BASE for trial in todo) and not Path(SECOND_BASE, "config.json").is_file():
        pretrain = [sys.executable, "examples/tiny-qwen3-moe/pretrain.py", "--seed", "1", "--out", SECOND_BASE]
        subprocess.run(pretrain, check=True)
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for number, result in enumerate(pool.imap_unordered(run_one, todo), 1):
            results.add(result)
            last, spent = result["curve"][-1], (time.perf_counter() - start) / 60
            told = f"{number}/{len(todo)} {spent:5.1f} min  {result['key']}: new {last[1]:.3f}, old {last[2]:.3f}"
            print(told, flush=True)
            if time.time() > deadline:
                break
    return not any(trial.key not in results.found for trial in wanted)


def tune(results: Results, jobs: int, deadline: float) -> bool:
    """Tries learning rates until the best of every arm is known; False when the time was up before."""
    wanted = tuning_trials(results)
    while len(results.of(wanted)) < len(wanted):
        if not run(wanted, results, jobs, deadline):
            return False
        wanted = tuning_trials(results)
    return True


def run_one(trial: Trial) -> dict:
    """One trial on one thread, so that its numbers do not depend on the machine's cores."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return {"key": trial.key, **trial.run()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at a time, each on one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on")
    arguments = parser.parse_args()
    path = RESULTS / ("freezing-short" if arguments.short else "freezing")
    results, deadline = Results(path.with_suffix(".jsonl")), time.time() + 60 * arguments.minutes
    if arguments.short:
        complete, tuning, wanted = True, [], short_trials()
    else:
        complete = arguments.page or tune(results, arguments.jobs, deadline)
        tuning = tuning_trials(results)
        wanted = trials(best_rates(results.of(tuning))) if complete else []
    if complete:
        if not arguments.page:
            run(wanted, results, arguments.jobs, deadline)
        write_page(results.of(wanted), results.of(tuning), path)
        print(f"wrote {path}.md")


if __name__ == "__main__":
    main()
