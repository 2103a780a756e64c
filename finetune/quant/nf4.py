"""NF4: weights in 4 bits, block by block, with the same bits as bitsandbytes (QLoRA, arXiv 2305.14314).

A block of consecutive weights shares one scale, its largest magnitude. A weight divided by its scale is stored as the
index of the nearest of 16 levels, two indices to a byte, the first in the high half. With double quantization the
scales, less their mean, are stored in 8 bits the same way, 256 to a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from finetune.errors import ModelError, Problem
from finetune.kernels.support import decodes_on
from finetune.quant.native import native_decode

BLOCKS = (64, 128)
SCALES_PER_BLOCK = 256
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero."""

_TILE = 2**16
_SMALLEST = 1e-38


@dataclass(frozen=True)
class Packed:
    """A tensor in NF4, or several of one shape with a leading dimension E on every field.

    codes: (ceil(n / 2),) uint8, two weights a byte.
    scales: (blocks,) float32, or uint8 with double quantization.
    scale_scales, offset: (ceil(blocks / 256),) and () float32, what decodes 8-bit scales; None without.
    shape: of the tensor itself.
    block: weights that share a scale.
    """

    codes: Tensor
    scales: Tensor
    scale_scales: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block: int

    def float_scales(self) -> Tensor:
        """The scale of every block, (blocks,) float32."""
        if self.scale_scales is None or self.offset is None:
            return self.scales
        decoded = scale_levels(self.scales.device).take(self.scales.long())
        wide = self.scale_scales.repeat_interleave(SCALES_PER_BLOCK, -1)[..., : self.scales.shape[-1]]
        return decoded.mul_(wide).add_(self.offset[..., None])


def quantize(weight: Tensor, *, block: int = 64, double: bool = True) -> Packed:
    """`weight` of any shape and floating type in NF4.

    Raises ModelError for a block size other than 64 or 128, an empty tensor, NaN or infinity.
    """
    if block not in BLOCKS:
        raise ModelError(Problem("block", "is not a block size of NF4", f"use one of {BLOCKS}", block))
    if weight.numel() == 0:
        raise ModelError(Problem("weight", "is empty", "quantize tensors with at least one element", weight.shape))
    flat = weight.detach().reshape(-1)
    whole = flat.numel() // block * block
    codes = torch.empty(flat.numel() + flat.numel() % 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
    tile = _TILE // block
    for first in range(0, whole // block, tile):
        last = min(first + tile, whole // block)
        here, rows = slice(first * block, last * block), slice(first, last)
        values = flat[here].to(torch.float32).view(-1, block)
        scales[rows] = values.abs().amax(1)
        reciprocal = scales[rows].clamp(min=_SMALLEST).reciprocal()
        _nearest_level(values * reciprocal[:, None], codes[here].view(-1, block))
    if whole < flat.numel():
        values = flat[whole:].to(torch.float32)
        scales[-1] = values.abs().amax().clamp(min=_SMALLEST)
        _nearest_level(values / scales[-1], codes[whole : flat.numel()])
    if flat.numel() % 2:
        codes[-1] = LEVELS.index(0.0)
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(Problem("weight", "holds NaN or infinity", "the checkpoint is damaged: download it again"))
    packed = codes[::2].bitwise_left_shift(4).bitwise_or_(codes[1::2])
    if not double:
        return Packed(packed, scales, None, None, tuple(weight.shape), block)
    offset = scales.mean()
    small, scale_scales = _quantize_scales(scales - offset)
    return Packed(packed, small, scale_scales, offset, tuple(weight.shape), block)


def decode(packed: Packed, dtype: torch.dtype, end_E: Tensor | None = None) -> Tensor:
    """The tensor in `dtype`: level times scale in float32, rounded once; what bitsandbytes decodes, bit for bit.

    end_E: of a stack of experts, where the rows of each end; on an accelerator those without any may become anything.
    """
    if decodes_on(packed.codes.device, dtype):
        return _decode_by_triton(packed, dtype, end_E)
    scales = packed.float_scales()
    native = native_decode(packed.codes.device.type, dtype)
    if native is not None and math.prod(packed.shape) % packed.block == 0:
        return native(packed.codes, scales, packed.block, dtype).view(packed.shape)
    out = torch.empty(math.prod(packed.shape), dtype=dtype, device=scales.device)
    _decode_into(out, packed.codes.view(-1), scales.view(-1), packed.block)
    return out.view(packed.shape)


def _decode_by_triton(packed: Packed, dtype: torch.dtype, end_E: Tensor | None) -> Tensor:
    from finetune.kernels.triton import nf4 as kernel

    device, number = packed.codes.device, packed.codes.shape[0] if packed.codes.ndim == 2 else 1
    fields = (packed.codes, packed.scales, packed.scale_scales)
    codes, scales, scale_scales = (None if t is None else t.reshape(number, -1) for t in fields)
    assert codes is not None
    assert scales is not None
    out_EN = torch.empty(number, math.prod(packed.shape) // number, dtype=dtype, device=device)
    levels = kernel.Levels(_levels(device), scale_levels(device))
    kernel.decode(kernel.Nf4(codes, scales, scale_scales, packed.offset, packed.block), levels, out_EN, end_E)
    return out_EN.view(packed.shape)


def _decode_into(out: Tensor, codes: Tensor, scales: Tensor, block: int) -> None:
    """A tile at a time: one look-up turns a byte into two float32 levels, which lie in one int64."""
    pairs, tile = _level_pairs(codes.device), _TILE // 2
    for first in range(0, codes.numel(), tile):
        part = codes[first : first + tile]
        levels = pairs.index_select(0, part.int()).view(torch.float32)
        here = out[2 * first : 2 * (first + part.numel())]
        whole = here.numel() // block
        part_scales = scales[2 * first // block :]
        body = levels[: whole * block].view(whole, block)
        here[: whole * block].view(whole, block).copy_(body.mul_(part_scales[:whole, None]))
        if whole * block < here.numel():
            here[whole * block :].copy_(levels[whole * block : here.numel()].mul_(part_scales[whole]))


def _nearest_level(scaled: Tensor, out: Tensor) -> None:
    """Index of the level nearest to each float32 in [-1, 1]; a value half way between two goes to the lower one.

    The upper half of a float's bits tells how many of the 15 middles lie below; where a middle has the same upper half
    one comparison with it decides.
    """
    below, middle = _middles_by_bits(scaled.device)
    upper = scaled.view(torch.int32).bitwise_right_shift(16).add_(2**15).view(-1)
    torch.add(below.index_select(0, upper), scaled.view(-1) > middle.index_select(0, upper), out=out.view(-1))


@cache
def _middles_by_bits(device: torch.device) -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of a float32, as a signed number plus 2^15: the number of middles certainly below, (2^16,)
    uint8, and the middle still to compare with, infinity for none, (2^16,) float32.
    """
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    middles = (levels[:-1] + levels[1:]) / 2
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32).bitwise_left_shift_(16)
    ends = torch.stack((upper.view(torch.float32), upper.bitwise_or(2**16 - 1).view(torch.float32))).nan_to_num(0.0)
    lowest, highest = ends.amin(0), ends.amax(0)
    below = torch.searchsorted(middles, lowest)
    inside = (below < len(middles)) & (middles[below.clamp(max=len(middles) - 1)] <= highest)
    limit = torch.where(inside, middles[below.clamp(max=len(middles) - 1)], float("inf"))
    return below.to(torch.uint8).to(device), limit.to(device)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks,) as 8-bit indices into `scale_levels`, and the largest magnitude of each 256 of them.

    Values are rounded to one of 2^16 equal steps over [-1, 1] first, as bitsandbytes does on CPU.
    """
    levels = scale_levels(scales.device)
    padded = torch.nn.functional.pad(scales, (0, -len(scales) % SCALES_PER_BLOCK)).view(-1, SCALES_PER_BLOCK)
    largest = padded.abs().amax(1)
    normed = (padded * largest.reciprocal()[:, None]).nan_to_num_(0.0).clamp_(-1, 1)
    step = ((normed + 1) * 0.5 * 65535 + 0.5).int()
    rounded = step.float() / 65535 * 2 - 1
    right = torch.searchsorted(levels, rounded).clamp_(1, len(levels) - 1)
    nearer_right = levels[right] - rounded < rounded - levels[right - 1]
    index = (right - 1 + nearer_right.long()).masked_fill_((largest == 0)[:, None], 0)
    return index.to(torch.uint8).view(-1)[: len(scales)], largest


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def _level_pairs(device: torch.device) -> Tensor:
    """Two float32 levels for each byte, as int64 (256,)."""
    byte, levels = torch.arange(256), torch.tensor(LEVELS, dtype=torch.float32)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).view(torch.int64).view(256).to(device)


@cache
def scale_levels(device: torch.device) -> Tensor:
    """The 256 levels of 8-bit scales in rising order, (256,) float32 (arXiv 2110.02861, section 1.3).

    Seven decades; decade i has 2^i steps on either side of zero; 1 is a level of its own.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)
