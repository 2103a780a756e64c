"""Threads for tensors that are handled side by side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch

MAX_WORKERS = 8


@contextmanager
def exact_workers() -> Iterator[Executor]:
    """A thread per core and one that waits for its turn to write, and float32 products that are float32.

    Each has one core for its own arithmetic. Tensors side by side use the cores better than threads inside of products
    this thin, and the result of a product does not depend on the number of cores.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision, threads = matmul.fp32_precision, torch.get_num_threads()
    if precision not in ("none", "ieee"):
        matmul.fp32_precision = "ieee"
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, MAX_WORKERS) + 1) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)
        if precision not in ("none", "ieee"):
            matmul.fp32_precision = precision
