"""Memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch


def peak_memory_gib() -> float:
    """GiB: on CUDA the most the allocator held, else the most resident memory the process ever had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def release_free_memory() -> None:
    """Give what the C allocator holds but does not use back to the system, where that is glibc's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
