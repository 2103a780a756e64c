"""NF4 stacks to weights: `w[e, i] = level[code[e, i]] s[e, i / B]`, with `s = scale_level[s8] scale_scale + offset`.

Rounded to float32 after each step and to the type of the weights at the end, as on the CPU: the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton.routing import has_rows
from finetune.kernels.triton.sizes import cdiv

VALUES = 4096
"""Weights of one program: 16 bytes of codes for each of its 128 threads."""

SCALES_PER_SCALE = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""A fused multiply and add would round a scale once where the CPU rounds it twice."""


class Nf4(NamedTuple):
    """A stack of experts, each packed by itself; contiguous.

    codes: (E, ceil(n / 2)) uint8, two weights a byte, the first in the high half.
    scales: (E, blocks) float32, or uint8 where there are scales of scales.
    scale_scales, offset: (E, ceil(blocks / 256)) and (E,) float32, or None.
    block: weights that share a scale, 64 or 128.
    """

    codes: Tensor
    scales: Tensor
    scale_scales: Tensor | None
    offset: Tensor | None
    block: int


class Levels(NamedTuple):
    """What codes mean, (16,) float32, and what 8-bit scales do, (256,) float32."""

    weights: Tensor
    scales: Tensor


@triton.jit
def decode_nf4(
    codes_ptr, scales_ptr, scale_scales_ptr, offset_ptr, level_ptr, scale_level_ptr, end_ptr, out_ptr,
    num_values, num_bytes, num_scales, num_scale_scales, run, stride_out, stride_run,
    DOUBLE: tl.constexpr, SKIP: tl.constexpr, WHOLE: tl.constexpr, B: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """S blocks of B weights of one expert, `run` of which lie side by side in the output.

    W: scales that share a scale. WHOLE: S B divides an expert's weights.
    """
    expert = tl.program_id(1).to(tl.int64)
    if SKIP:  # noqa: SIM102 - there is no end_ptr otherwise
        if not has_rows(end_ptr, expert):
            return
    block_S = tl.program_id(0) * S + tl.arange(0, S)
    ok_S = block_S < num_scales
    scale_S = tl.load(scales_ptr + expert * num_scales + block_S, mask=ok_S, other=0)
    if DOUBLE:
        wide_S = tl.load(scale_scales_ptr + expert * num_scale_scales + block_S // W, mask=ok_S, other=0.0)
        scale_S = tl.load(scale_level_ptr + scale_S.to(tl.int32)) * wide_S + tl.load(offset_ptr + expert)
    byte_SC = block_S[:, None] * (B // 2) + tl.arange(0, B // 2)[None, :]
    code_ptrs = codes_ptr + expert * num_bytes + byte_SC
    code_SC = tl.load(code_ptrs) if WHOLE else tl.load(code_ptrs, mask=byte_SC < num_bytes, other=0)
    code_SC = code_SC.to(tl.int32)
    even_SC = (tl.load(level_ptr + (code_SC >> 4)) * scale_S[:, None]).to(out_ptr.dtype.element_ty)
    odd_SC = (tl.load(level_ptr + (code_SC & 15)) * scale_S[:, None]).to(out_ptr.dtype.element_ty)
    values_SB, step_B = tl.interleave(even_SC, odd_SC), tl.arange(0, B)
    start_S = block_S * B // run * stride_run + block_S * B % run
    out_ptrs = out_ptr + expert * stride_out + (start_S[:, None] + step_B[None, :])
    if WHOLE:
        tl.store(out_ptrs, values_SB)
    else:
        tl.store(out_ptrs, values_SB, mask=block_S[:, None] * B + step_B[None, :] < num_values)


def can_decode_to(out_EOI: Tensor, block: int) -> bool:
    """Whether `decode` takes this output: blocks must not go on in a row that lies elsewhere."""
    return out_EOI.is_contiguous() or (out_EOI.stride(2) == 1 and out_EOI.shape[2] % block == 0)


def decode(stack: Nf4, levels: Levels, out_EOI: Tensor, end_E: Tensor | None = None) -> None:
    """All weights of a stack into `out_EOI`, (E, out, in), in one launch; see `can_decode_to`.

    end_E: where each expert's rows end; experts without rows are left out.
    """
    num_experts, height, width = out_EOI.shape
    num_values = height * width
    num_scale_scales = 0 if stack.scale_scales is None else stack.scale_scales.shape[1]
    decode_nf4[(cdiv(num_values, VALUES), num_experts)](
        stack.codes, stack.scales, stack.scale_scales, stack.offset, *levels, end_E, out_EOI,
        num_values, stack.codes.shape[1], stack.scales.shape[1], num_scale_scales,
        num_values if out_EOI.is_contiguous() else width, out_EOI.stride(0), out_EOI.stride(1),
        DOUBLE=num_scale_scales > 0, SKIP=end_E is not None, WHOLE=num_values % VALUES == 0,
        B=stack.block, W=SCALES_PER_SCALE, S=VALUES // stack.block, **OPTIONS,
    )  # fmt: skip
