"""Seconds and memory of steps on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

GIB = 2**30
Run = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device, repeats: int) -> float:
    """Mean time of `repeats` runs back to back."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def alternating(
    runs: dict[str, Callable[[], None]], device: torch.device, rounds: int, repeats: int
) -> dict[str, float]:
    """Median seconds of each run over rounds in which all take turns, after two to warm up."""
    for run in runs.values():
        seconds(run, device, 2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device, repeats))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_gib(run: Run, device: torch.device) -> float:
    """Most memory allocated during one run above what was held before; 0 where the device does not tell."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / GIB


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Rate of one square product of random numbers, the ceiling of everything here."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / alternating({"mm": lambda: torch.mm(a, b)}, device, 5, 10)["mm"]
