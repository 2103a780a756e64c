"""Time to the first answer: `finetune --help` and `finetune check`, as whole processes.

    python benchmarks/startup.py [--runs 9]

Prints minimum, median and maximum seconds, beside those of an interpreter that does nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "finetune --help": ["-m", "finetune", "--help"],
    "finetune check": ["-m", "finetune", "check", "recipes/quickstart.yaml"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    for arguments in COMMANDS.values():
        seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    print(f"{'command':<18} {'min':>6} {'median':>6} {'max':>6}  seconds, {runs} alternating runs")
    for name, values in times.items():
        print(f"{name:<18} {min(values):6.2f} {statistics.median(values):6.2f} {max(values):6.2f}")


if __name__ == "__main__":
    main()
