"""Whether Triton's kernels run on a device."""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_fault(device: torch.device) -> str | None:
    """Why they do not, None when they do. Triton's interpreter runs them anywhere."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "Triton's kernels need a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need compute capability 8.0"
    return None


def decodes_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed weights on a device are decoded to `dtype` by Triton."""
    return device.type == "cuda" and dtype != torch.float64 and triton_fault(device) is None
