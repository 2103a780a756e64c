"""The loss of a training step: log-probabilities of next tokens under a frozen head, and their gradient.

    python benchmarks/loss.py                    2,047 tokens, hidden size 2,048, bfloat16, two vocabularies
    python benchmarks/loss.py --tokens 512 --hidden 256 --dtype float32        a small CPU
    python benchmarks/loss.py --tokens 16384     a GPU

Ours against TRL's and Liger's, as far as they are installed and run on the device, which is the GPU where there is one.
A small case is compared with float64 first, loss and gradient; who is wrong there gives no numbers. Contestants live
in their own processes and run by turns; times are medians, ratios medians of the rounds' ratios, memory is what a step
adds to resident memory, or to what is allocated on the GPU, at its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

from results import GIB, save, table
from rounds import Contest, extra_peak_bytes

SMALL = 37, 48, 101
"""Tokens, hidden size and vocabulary of the case that is compared with float64."""
WORST = {"float32": 1e-5, "bfloat16": 2e-2}
"""Error of loss and gradient there, of their largest value."""
VOCABULARIES = {"of the 2-layer benchmarks": 6336, "Qwen3's": 151_936}


def ways() -> list[str]:
    """Who can run here."""
    import torch

    found = ["ours"]
    if find_spec("trl.kernels") if find_spec("trl") else None:
        found.insert(0, "TRL")
    if torch.cuda.is_available() and find_spec("liger_kernel"):
        found.append("Liger")
    return found


class Loss:
    """Mean negative log-likelihood of random tokens under a random frozen head, and its gradient."""

    def __init__(self, way: str, tokens: int, hidden: int, vocabulary: int, dtype: str) -> None:
        import torch

        self.way, kind = way, getattr(torch, dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        self.hidden_NH = torch.randn(tokens, hidden, generator=generator).to(self.device, kind).requires_grad_()
        self.head_VH = torch.randn(vocabulary, hidden, generator=generator).mul_(0.02).to(self.device, kind)
        self.target_N = torch.randint(vocabulary, (tokens,), generator=generator).to(self.device)
        self.loss = 0.0

    def prepare(self, case: int) -> None:
        """The same tokens each time."""

    def step(self) -> None:
        """Forward and backward, and all of it done."""
        self.hidden_NH.grad = None
        loss = self._loss()
        loss.backward()
        self.loss = loss.item()

    def _loss(self) -> Any:
        if self.way == "ours":
            from finetune.kernels.log_probs import log_probs

            return -log_probs(self.hidden_NH, self.head_VH, self.target_N)[0].mean()
        if self.way == "Liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss()(self.head_VH, self.hidden_NH, self.target_N)
        from trl.kernels import ChunkedLogProbFunction  # as its trainer calls it

        asked = (1.0, 32_768, None, 1.0, ("log_probs", "entropy", "is_top1"))
        return -ChunkedLogProbFunction.apply(self.hidden_NH, self.head_VH, None, self.target_N, *asked)[0].mean()

    def facts(self) -> dict[str, Any]:
        """The loss; the error against float64, of the largest value; on a GPU what a step adds there."""
        import torch

        if not self.loss:
            return {}
        leaf_NH = self.hidden_NH.detach().double().requires_grad_()
        want = torch.nn.functional.cross_entropy(leaf_NH @ self.head_VH.double().t(), self.target_N)
        (grad_NH,) = torch.autograd.grad(want, leaf_NH)
        off = (self.hidden_NH.grad.double() - grad_NH).abs().max() / grad_NH.abs().max()
        return {"loss": self.loss, "errors": [abs(self.loss / want.item() - 1), off.item()]}

    def peak_bytes(self) -> int:
        """What a step adds at its peak."""
        import torch

        if self.device.type == "cpu":
            return extra_peak_bytes(self.step)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return torch.cuda.max_memory_allocated() - before


class Large(Loss):
    """The measured case, whose facts need no float64."""

    def facts(self) -> dict[str, Any]:
        """The loss and what a step adds at its peak."""
        return {"loss": self.loss, "extra_peak_bytes": self.peak_bytes()} if self.loss else {}


def check(names: list[str], dtype: str) -> dict[str, list[float]]:
    """Errors of loss and gradient of everyone on the small case; ends the program where they are too large."""
    errors = {}
    for name in names:
        small = Loss(name, *SMALL, dtype)
        small.step()
        errors[name] = small.facts()["errors"]
    wrong = {name: found for name, found in errors.items() if not max(found) <= WORST[dtype]}
    if wrong:
        sys.exit(f"error: loss or gradient is wrong by {wrong} of its value: no numbers from wrong work")
    return errors


def measure(vocabulary: int, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of all."""
    size = {"tokens": options.tokens, "hidden": options.hidden, "vocabulary": vocabulary, "dtype": options.dtype}
    with Contest({name: partial(Large, name, **size) for name in names}, options.threads) as contest:
        times = contest.run(options.rounds, warmup=1)
        found = {name: contest.ask(name, "facts") for name in names}
    losses = [one["loss"] for one in found.values()]
    if not max(losses) - min(losses) <= 1e-3 * min(losses):
        sys.exit(f"error: the losses differ, {losses}: no numbers from different work")
    memory = {name: one["extra_peak_bytes"] for name, one in found.items()}
    return {"vocabulary": vocabulary, "seconds": times, "extra_peak_bytes": memory, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2047)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, help="one instead of the two")
    parser.add_argument("--dtype", default="bfloat16", choices=list(WORST))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write results/DATE-loss.md and .json")
    options = parser.parse_args()
    names, vocabularies = ways(), VOCABULARIES
    if options.vocabulary:
        vocabularies = {"asked for": options.vocabulary}
    errors = check(names, options.dtype)
    found = [measure(vocabulary, names, options) for vocabulary in vocabularies.values()]
    rows = [
        [f"{one['vocabulary']:,} ({name})", way, statistics.median(times),
         statistics.median(a / b for a, b in zip(one["seconds"][names[0]], times, strict=True)),
         one["extra_peak_bytes"][way] / GIB]
        for name, one in zip(vocabularies, found, strict=True)
        for way, times in one["seconds"].items()
    ]  # fmt: skip
    header = ["vocabulary", "loss", "median s", f"times as fast as {names[0]}", "extra peak GiB"]
    size = f"{options.tokens:,} tokens, hidden size {options.hidden:,}, {options.dtype}, {options.threads} threads"
    worst = ", ".join(f"{name} {max(found):.1e}" for name, found in errors.items())
    text = f"{size}; worst error against float64 on a small case: {worst}\n\n{table(header, rows)}\n"
    print(json.dumps(found) if options.json else text)
    if options.save:
        for path in save("loss", "The loss of a training step", {"errors": errors, "found": found}, text):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
