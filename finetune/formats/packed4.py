"""Matrices in 4 bits as GPTQ and AWQ files pack them: names, shapes, and the way back to floats.

Of a weight (out, in) with one scale per `group` inputs, both keep the transposed codes, eight in an int32:

    gptq   qweight (in / 8, out), qzeros (in / group, out / 8) minus one, scales (in / group, out), g_idx (in)
    awq    qweight (in, out / 8), qzeros (in / group, out / 8), scales (in / group, out); eights in the order AWQ_ORDER
"""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column of nibble n, lowest first, is order.index(n)


def packed_shapes(to: str, shape: tuple[int, int], group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Ending of the name -> (safetensors dtype, shape) of the tensors that stand for a weight (out, in)."""
    out, width = shape
    made: dict[str, tuple[str, tuple[int, ...]]] = {
        "qweight": ("I32", (width // 8, out) if to == "gptq" else (width, out // 8)),
        "qzeros": ("I32", (width // group, out // 8)),
        "scales": ("F16", (width // group, out)),
    }
    return made | ({"g_idx": ("I32", (width,))} if to == "gptq" else {})


def unpack(to: str, tensors: dict[str, Tensor], group: int) -> Tensor:
    """The weight (out, in) in float32."""
    zeros = _eights(tensors["qzeros"], to)
    if to == "gptq":
        codes_IO = _nibbles(tensors["qweight"]).movedim(-1, 1).reshape(-1, tensors["qweight"].shape[1])
        groups = tensors["g_idx"].long()
        zeros = zeros + 1
    else:
        codes_IO = _eights(tensors["qweight"], to)
        groups = torch.arange(len(codes_IO)) // group
    scales = tensors["scales"].float()
    return ((codes_IO - zeros[groups]).float() * scales[groups]).T


def _nibbles(words: Tensor) -> Tensor:
    return (words.long()[..., None] >> (4 * torch.arange(8))) & 15


def _eights(words: Tensor, to: str) -> Tensor:
    """Codes of words (rows, columns / 8) as (rows, columns)."""
    codes = _nibbles(words)
    if to == "awq":
        codes = codes[..., list(AWQ_ORDER)]
    return codes.reshape(len(words), -1)
