"""What one expert layer costs the host: microseconds to start it, and how many things it starts.

Triton's launches are replaced by a counter, so this runs without a GPU: what is left is Python, torch's dispatcher and
allocations. The layer is tiny, so torch's own operations cost their start alone.

    python -m benchmarks.launches
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from finetune.kernels import device_op
from finetune.kernels.layer import ExpertLayer, Factors


@contextmanager
def launches_stubbed(counted: Counter[str] | None = None) -> Iterator[None]:
    """Triton's kernels return at once; `counted` learns their names."""
    real = JITFunction.run

    def run(self: JITFunction[Any], *args: Any, **_: Any) -> None:
        name = self.fn.__name__
        if counted is not None:
            counted[name] += 1
        if name == "place_pairs":  # what torch's operations follow must lead somewhere
            for tensor in args[2:3]:
                tensor.zero_()

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = real  # type: ignore[method-assign]


class Layer:
    """A tiny layer with factors on all experts, its tokens and the gradient of its output."""

    def __init__(self, tokens: int = 64, experts: int = 8, top_k: int = 4, hidden: int = 64, rank: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        random = partial(torch.randn, generator=generator)
        slot_E = torch.arange(experts)
        bank = partial(torch.empty, dtype=torch.bfloat16)

        def factors(width: int, height: int) -> Factors:
            a_XRI, b_XOR = random(experts, rank, width), random(experts, height, rank)
            return Factors(a_XRI.requires_grad_(), b_XOR.requires_grad_(), 2.0, slot_E)

        gate_up, down = bank(experts, hidden, hidden).zero_(), bank(experts, hidden, hidden // 2).zero_()
        loras = factors(hidden, hidden), factors(hidden // 2, hidden)
        self.layer = ExpertLayer(gate_up, down, *loras)
        self.x = random(tokens, hidden).bfloat16().requires_grad_()
        self.index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        self.weights = torch.rand(tokens, top_k, generator=generator).bfloat16().requires_grad_()
        self.d_out = random(tokens, hidden).bfloat16()
        self.leaves = [self.x, self.weights, *(t for lora in loras for t in (lora.a_XRI, lora.b_XOR))]

    def forward(self, products: str = "triton") -> Tensor:
        """The layer's output."""
        return device_op.expert_mlp(self.x, self.index, self.weights, self.layer, False, products)

    def backward(self, out: Tensor) -> None:
        """All gradients."""
        torch.autograd.grad(out, self.leaves, self.d_out)


def microseconds(call: Callable[[Any], Any], prepare: Callable[[], Any], rounds: int) -> float:
    """Median of `call` alone, given what `prepare` returns."""
    times = []
    for _ in range(rounds):
        ready = prepare()
        start = time.perf_counter_ns()
        call(ready)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def main() -> None:
    """Print the table as JSON, and with --profile where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layer = Layer()
    with launches_stubbed():
        layer.backward(layer.forward())
        found = {
            "forward_us": microseconds(lambda _: layer.forward(), lambda: None, options.rounds),
            "backward_us": microseconds(layer.backward, layer.forward, options.rounds),
        }
        if options.profile:
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(options.rounds):
                layer.backward(layer.forward())
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    counted: Counter[str] = Counter()
    with launches_stubbed(counted):
        out = layer.forward()
        found["forward_kernels"] = counted.total()
        layer.backward(out)
        found["backward_kernels"] = counted.total() - found["forward_kernels"]
    print(json.dumps({name: round(value, 1) for name, value in found.items()} | {"kernels": counted}, indent=1))


if __name__ == "__main__":
    main()
