"""What this machine has, as far as that can be seen without torch."""

from __future__ import annotations

import os
from pathlib import Path

_DRIVERS = ("/proc/driver/nvidia/gpus", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What a GPU's driver puts on a Linux machine."""


def has_gpu() -> bool | None:
    """Whether a driver shows a GPU; None where that is not known."""
    return any(Path(path).exists() for path in _DRIVERS) if os.uname().sysname == "Linux" else None


def memory_gib() -> float:
    """Memory of the machine, or the limit that this process is held to."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            sizes.append(int(limit.read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is none, or it says max
            continue
    return min(sizes) / 2**30


def lacking_memory(needed_gib: float) -> str | None:
    """That weights of that size fit nowhere here; None where they may."""
    if has_gpu() is not False or needed_gib < memory_gib():
        return None
    has = f"this machine has {memory_gib():,.0f} GiB and no GPU"
    return f"weights and optimizer need {needed_gib:,.0f} GiB, and {has}"
