"""Packed stacks with random weights: their bytes are drawn on the device, without 16-bit weights or bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.quant.experts import Fp8Projection, Nf4Projection, PackedProjection, Scheme, packed_shapes

SCHEMES: tuple[Scheme, ...] = ("nf4", "fp8")
BLOCK = {"nf4": 64, "fp8": 128}
STD = 0.02
FP8_STD = 100.0
"""Of e4m3 values whose bits are drawn evenly."""


def random_stack(
    scheme: Scheme, shape: tuple[int, int, int], matrices: int, dtype: torch.dtype, generator: torch.Generator
) -> PackedProjection:
    """A stack (E, out, in) on the generator's device, its weights of about STD. matrices: 2 for gate_up, 1 for down."""
    expected = packed_shapes(scheme, shape[1:], BLOCK[scheme], True, matrices)
    fields = {
        name: torch.empty((shape[0], *size), dtype=kind, device=generator.device)
        for name, (kind, size) in expected.items()
    }
    for name, field in fields.items():
        _draw_(scheme, name, field, generator)
    if scheme == "nf4":
        return Nf4Projection(fields, shape, BLOCK[scheme], dtype)
    return Fp8Projection(fields, shape, BLOCK[scheme], dtype, matrices)


def _draw_(scheme: Scheme, name: str, field: Tensor, generator: torch.Generator) -> None:
    if field.dtype == torch.uint8:
        field.random_(0, 256, generator=generator)
        if scheme == "fp8":
            field.masked_fill_(field.bitwise_and(0x7F) == 0x7F, 0)  # those are NaN
        return
    # levels of NF4 have a deviation of 0.6; 8-bit scales change an NF4 scale by up to a quarter
    size = {"scales": STD / FP8_STD, "scale_scales": STD / 2, "offset": STD / 0.6}[name]
    field.uniform_(0.8 * size, 1.2 * size, generator=generator)
