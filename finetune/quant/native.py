"""bitsandbytes where it is installed: its native decode of NF4 and its 4-bit linear layer. Nothing else imports it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

NativeDecode = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]


@cache
def bitsandbytes() -> Any | None:
    """The library, or None where it is not installed or does not load."""
    try:
        import bitsandbytes as library

        return library
    except (ImportError, OSError, RuntimeError):
        return None


def native_decode(device: str, dtype: torch.dtype) -> NativeDecode | None:
    """(codes, float32 scales, block, dtype) -> (blocks, block), several times as fast as torch; None where missing."""
    if device not in ("cpu", "cuda") or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return _decode if bitsandbytes() is not None else None


def _decode(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:  # how it rounds to float16 differs from processor to processor; torch rounds to nearest
        return _decode(codes, scales, block, torch.float32).to(dtype)
    shape = (scales.numel(), block)  # on CPU it looks for the scales of each row apart, so a row is a block
    decoded: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes.reshape(-1), scales.reshape(-1), block, "nf4", shape, dtype
    )
    return decoded
