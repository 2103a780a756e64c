"""Random stacks of experts, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.models import fp8
from finetune.quant import nf4
from finetune.quant.experts import Fp8Projection, Nf4Projection, PackedProjection

SCHEMES = {"nf4": {}, "nf4, scales not": {"double": False, "block": 128}, "fp8": {}}


def pack(bank_EOI: Tensor, scheme: str, *, matrices: int = 1) -> PackedProjection:
    """`bank_EOI` as one of SCHEMES; its weights are decoded to the type it has. matrices: see Fp8Projection."""
    if scheme == "fp8":
        return _fp8(bank_EOI, matrices)
    packed = [nf4.quantize(expert, **SCHEMES[scheme]) for expert in bank_EOI]
    names = [name for name in ("codes", "scales", "scale_scales", "offset") if getattr(packed[0], name) is not None]
    fields = {name: torch.stack([getattr(expert, name) for expert in packed]) for name in names}
    return Nf4Projection(fields, bank_EOI.shape, packed[0].block, bank_EOI.dtype)


def _fp8(bank_EOI: Tensor, matrices: int) -> PackedProjection:
    pairs = [
        [fp8.quantize(matrix.float(), (128, 128), torch.float32) for matrix in expert.chunk(matrices)]
        for expert in bank_EOI
    ]
    codes = [torch.cat([values.reshape(-1).view(torch.uint8) for values, _ in expert]) for expert in pairs]
    scales = [torch.cat([scales.reshape(-1) for _, scales in expert]) for expert in pairs]
    fields = {"codes": torch.stack(codes), "scales": torch.stack(scales)}
    return Fp8Projection(fields, bank_EOI.shape, 128, bank_EOI.dtype, matrices)


def decoded(stack: PackedProjection, dtype: torch.dtype | None = None) -> Tensor:
    """All weights of a stack."""
    return stack.weights_of(range(stack.shape[0]), dtype or stack.dtype)
