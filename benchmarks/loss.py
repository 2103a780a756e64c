"""The loss of a training step on a CPU, ours against TRL's: log-probabilities of next tokens and their gradient.

    python benchmarks/loss.py                    2,047 tokens, hidden size 2,048, bfloat16, two vocabularies

Contestants live in their own processes and run by turns; times are medians, ratios medians of the rounds' ratios,
memory is what a step adds to resident memory at its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from typing import Any

from results import GIB, save, table
from rounds import Contest

TOKENS, HIDDEN = 2047, 2048
VOCABULARIES = {"of the 2-layer benchmarks": 6336, "Qwen3's": 151_936}


class Loss:
    """Mean negative log-likelihood of random tokens under a random frozen head, and its gradient."""

    def __init__(self, way: str, vocabulary: int) -> None:
        import torch

        self.way = way
        generator = torch.Generator().manual_seed(0)
        self.hidden_NH = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().requires_grad_()
        self.head_VH = torch.randn(vocabulary, HIDDEN, generator=generator).mul_(0.02).bfloat16()
        self.target_N = torch.randint(vocabulary, (TOKENS,), generator=generator)
        self.loss = 0.0

    def prepare(self, case: int) -> None:
        """The same tokens each time."""

    def step(self) -> None:
        """Forward and backward."""
        if self.way == "ours":
            from finetune.kernels.log_probs import log_probs

            logp_N, _ = log_probs(self.hidden_NH, self.head_VH, self.target_N)
        else:
            from trl.kernels import ChunkedLogProbFunction  # as its trainer calls it

            asked = (1.0, 32_768, None, 1.0, ("log_probs", "entropy", "is_top1"))
            logp_N = ChunkedLogProbFunction.apply(self.hidden_NH, self.head_VH, None, self.target_N, *asked)[0]
        self.hidden_NH.grad = None
        loss = -logp_N.mean()
        loss.backward()
        self.loss = loss.item()

    def facts(self) -> dict[str, Any]:
        """The loss."""
        return {"loss": self.loss}


def measure(vocabulary: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds and memory of both."""
    with Contest({way: partial(Loss, way, vocabulary) for way in ("TRL", "ours")}, threads) as contest:
        times = contest.run(rounds, warmup=1)
        memory = contest.memory()
        losses = [contest.ask(way, "facts")["loss"] for way in times]
    if not max(losses) - min(losses) <= 1e-3 * min(losses):
        sys.exit(f"error: the losses differ, {losses}: no numbers from different work")
    return {"vocabulary": vocabulary, "seconds": times, "extra_peak_bytes": memory, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write results/DATE-loss.md and .json")
    options = parser.parse_args()
    found = [measure(vocabulary, options.rounds, options.threads) for vocabulary in VOCABULARIES.values()]
    rows = [
        [f"{one['vocabulary']:,} ({name})", way, statistics.median(times),
         statistics.median(a / b for a, b in zip(one["seconds"]["TRL"], times, strict=True)),
         one["extra_peak_bytes"][way] / GIB]
        for name, one in zip(VOCABULARIES, found, strict=True)
        for way, times in one["seconds"].items()
    ]  # fmt: skip
    header = ["vocabulary", "loss", "median s", "times as fast", "extra peak GiB"]
    text = f"{TOKENS} tokens, {options.threads} threads\n\n{table(header, rows)}\n"
    print(json.dumps(found) if options.json else text)
    if options.save:
        for path in save("loss", "The loss of a training step on a CPU", {"found": found}, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
