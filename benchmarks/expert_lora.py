"""One expert layer with LoRA, forward and backward, against the same layer frozen and against the alternatives.

    python benchmarks/expert_lora.py                                 Qwen3-30B-A3B's layer, 512 and 2,048 tokens
    python benchmarks/expert_lora.py --shape tiny                    the embedded model's layer
    python benchmarks/expert_lora.py --tokens 512 --rank 64 --only frozen ours

Each contestant lives in its own process; they run by turns, every round with another routing. Times are medians;
ratios are medians of the rounds' ratios. Memory is what a step adds to resident memory at its peak. No number is
printed unless all agree on the output and on the gradient of the tokens.

    frozen      transformers' layer with grouped_mm and no adapter: the limit
    ours        this package
    separated   the low-rank path as grouped_mm products of its own, added to the base's
    stock       stock PEFT's target_parameters with grouped_mm
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy
from layers import LAYERS, SHAPES, Shape, describe
from results import GIB, save, table
from rounds import Contest

DEFAULT_TOKENS = {"qwen3-30b-a3b": [512, 2048], "tiny": [256, 1024]}
DEFAULT_ROUNDS = {"qwen3-30b-a3b": 11, "tiny": 101}
TOLERANCE = {"bfloat16": 0.03, "float16": 0.01, "float32": 1e-4}


def measure(shape: Shape, names: list[str], *, rounds: int, threads: int, backend: str) -> dict[str, Any]:
    """Seconds and extra peak bytes of each contestant, and their ratios to the first."""
    builders = {name: partial(LAYERS[name], shape, backend) for name in names}
    with Contest(builders, threads) as contest:
        check_agreement({name: contest.ask(name, "facts") for name in names}, shape)
        times = contest.run(rounds, warmup=6)
        memory = contest.memory()
    return {
        "shape": describe(shape),
        "threads": threads,
        "seconds": times,
        "contestants": {
            name: {
                "median_s": statistics.median(times[name]),
                "extra_peak_bytes": memory[name],
                **{f"time_over_{other}": ratio(times[name], times[other]) for other in names if other != name},
            }
            for name in names
        },
    }


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def check_agreement(facts: dict[str, Any], shape: Shape) -> None:
    """Stops unless contestants with factors compute the same; those without are compared with one another."""
    for group in (["ours", "separated", "stock"], ["frozen", "ours_frozen"]):
        present = [name for name in group if name in facts]
        for what in ("out", "d_x"):
            for name in present[1:]:
                want, got = (facts[n][what] for n in (present[0], name))
                error = float(numpy.linalg.norm(got - want) / numpy.linalg.norm(want))
                if shape.trained_share < 1 and name == "stock":
                    continue  # its factors of the other experts are zero, its arithmetic is not ours
                if not error <= TOLERANCE[shape.dtype]:
                    sys.exit(
                        f"error: {name} and {present[0]} differ in {what} by {error:.2g}: no numbers from wrong code"
                    )


def render(found: dict[str, Any]) -> str:
    """One Markdown table."""
    shape, contestants = found["shape"], found["contestants"]
    title = ", ".join(f"{key} {value}" for key, value in shape.items())
    others = [name for name in ("frozen", "stock") if name in contestants]
    rows = [
        [
            name,
            1e3 * c["median_s"],
            *(1.0 if other == name else c[f"time_over_{other}"] for other in others),
            c["extra_peak_bytes"] / GIB,
            *(c["extra_peak_bytes"] / contestants[other]["extra_peak_bytes"] for other in others),
        ]
        for name, c in contestants.items()
    ]
    header = [
        "layer",
        "median ms",
        *(f"time / {other}" for other in others),
        "extra peak GiB",
        *(f"memory / {other}" for other in others),
    ]
    rounds = len(next(iter(found["seconds"].values())))
    return f"{title}; {found['threads']} threads, {rounds} alternating rounds\n\n{table(header, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b", help="defaults of what follows")
    parser.add_argument("--tokens", type=int, nargs="+")
    for name in ("experts", "hidden", "intermediate", "top-k", "rank"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--trained-share", type=float, help="share of the experts that have factors")
    parser.add_argument("--skew", type=float, help="how unevenly experts are loaded; 0 is evenly")
    parser.add_argument("--dtype", choices=TOLERANCE)
    parser.add_argument("--backend", default="auto", help="of ours")
    parser.add_argument("--only", nargs="+", choices=LAYERS, default=["frozen", "ours", "separated", "stock"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", metavar="NAME", help="write results/DATE-NAME.md and .json")
    options = parser.parse_args()
    fields = ("experts", "hidden", "intermediate", "top_k", "rank", "trained_share", "skew", "dtype")
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    found = []
    for tokens in options.tokens or DEFAULT_TOKENS[options.shape]:
        shape = replace(SHAPES[options.shape], tokens=tokens, **given)
        rounds = options.rounds or DEFAULT_ROUNDS[options.shape]
        found.append(measure(shape, options.only, rounds=rounds, threads=options.threads, backend=options.backend))
        print(json.dumps(found[-1]) if options.json else render(found[-1]), flush=True)
    if options.save:
        title = "One expert layer with LoRA, forward and backward"
        paths = save(options.save, title, {"cases": found}, "\n".join(map(render, found)))
        print("\n".join(map(str, paths)), file=sys.stderr)


if __name__ == "__main__":
    main()
