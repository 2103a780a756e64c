"""Does it matter which experts train? The freezing study on the embedded base model.

    python benchmarks/freezing/study.py --short            a first look: 8 arms, 3 seeds, one learning rate
    python benchmarks/freezing/study.py                    the whole study: every arm, 8 seeds where it matters
    python benchmarks/freezing/study.py --base OTHER ...   the base to use; may be given several times
    python benchmarks/freezing/study.py --page             only write the page from the results there are

A trial that is in the file of results is not run again, so the study can be stopped and continued at any time.
A second base: python examples/tiny-qwen3-moe/pretrain.py --seed 1 --out DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from arms import ARMS, MANY_SEEDS, SHORT_ARMS
from page import write_page
from trial import Trial

RESULTS = Path("runs/freezing/results.jsonl")
PAGE = Path("benchmarks/results/freezing")
BASE = "examples/tiny-qwen3-moe"


def trials(bases: list[str], short: bool) -> Iterator[Trial]:
    """The grid, seeds outermost, so that an unfinished study is balanced."""
    seeds, few, steps, every = (3, 3, 150, 30) if short else (8, 3, 240, 20)
    for seed in range(seeds):
        for base in bases:
            for replay in (True,) if short else (True, False):
                for arm in ARMS:
                    if short and arm.name not in SHORT_ARMS:
                        continue
                    if seed >= few and arm.name not in MANY_SEEDS:
                        continue
                    for rate in (arm.short_rate,) if short else arm.rates:
                        yield Trial(base, arm.name, rate, seed, replay, steps, every)


def read_results(path: Path) -> dict[str, dict]:
    """Results by key; a last line cut short by a kill is left out."""
    found = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[result["key"]] = result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--base", action="append")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that numbers do not depend on the machine's cores
    torch.use_deterministic_algorithms(True, warn_only=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(RESULTS)
    todo = [trial for trial in trials(arguments.base or [BASE], arguments.short) if trial.key not in done]
    start = time.perf_counter()
    if not arguments.page:
        for number, trial in enumerate(todo, 1):
            if time.perf_counter() - start > 60 * arguments.minutes:
                break
            result = {"key": trial.key, **trial.run()}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
                file.flush()
                os.fsync(file.fileno())
            done[trial.key] = result
            last = result["curve"][-1]
            spent = (time.perf_counter() - start) / 60
            print(
                f"{number}/{len(todo)} {spent:5.1f} min  {trial.key}: new {last[1]:.3f}, old {last[2]:.3f}", flush=True
            )
    write_page(list(done.values()), PAGE)
    print(f"wrote {PAGE}.md and {PAGE}.json")


if __name__ == "__main__":
    main()
