"""Memory of this process."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch


def peak_memory_gib() -> float:
    """GiB: on CUDA the most the allocator held, else the most resident memory the process ever had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
MANY_TOKENS = 1024
"""In a micro-batch of fewer, shapes recur often enough that forgetting them costs a fifth of the step."""


def hold_little_memory(tokens: int) -> None:
    """Let this process keep less of what nothing is stored in, from now on; for models that hardly fit a CPU's memory.

    Compiled 16-bit products take 0.3 MB each and are kept for as many as 1,024 shapes; scattered over the heap, they
    also keep it from shrinking. Few are ever asked for again where a layer has many tokens, so few are kept, unless
    the environment says how many. Big tensors go back to the system as soon as they are free.

    tokens: of a micro-batch. Call it before the first product: oneDNN reads its setting once.
    """
    if tokens >= MANY_TOKENS:
        os.environ.setdefault(CACHE, "32")
    _glibc("mallopt", -3, 16 * 2**20)  # M_MMAP_THRESHOLD


def release_free_memory() -> None:
    """Give what the C allocator holds but does not use back to the system, where that is glibc's."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library where it has it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
