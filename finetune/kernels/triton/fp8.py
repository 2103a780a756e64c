"""FP8 stacks to weights: `w[e, r, c] = value[e, r, c] scale[e, block of (r, c)]`, e4m3 in square blocks.

The product is rounded to float32 and then to the type of the weights, as on the CPU: the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton.routing import has_rows
from finetune.kernels.triton.sizes import cdiv

VALUES = 4096
"""Weights of one program."""


class Fp8(NamedTuple):
    """A stack of experts; contiguous.

    codes: (E, out * in) uint8, the bits of e4m3 values.
    scales: (E, matrices * ceil(out / matrices / block) * ceil(in / block)) float32.
    matrices: above one another in each expert, with blocks of their own.
    block: rows and columns of a block, a power of two.
    """

    codes: Tensor
    scales: Tensor
    matrices: int
    block: int


@triton.jit
def decode_fp8(
    codes_ptr, scales_ptr, end_ptr, out_ptr, height, width, matrix_height, num_scales,
    stride_out, stride_row,
    SKIP: tl.constexpr, B: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """S rows of B columns of one expert, all in one column of blocks."""
    expert = tl.program_id(1).to(tl.int64)
    if SKIP:  # noqa: SIM102 - there is no end_ptr otherwise
        if not has_rows(end_ptr, expert):
            return
    num_columns = tl.cdiv(width, B)
    column = tl.program_id(0) % num_columns
    row_S, column_B = tl.program_id(0) // num_columns * S + tl.arange(0, S), column * B + tl.arange(0, B)
    matrix_S = row_S // matrix_height
    block_row_S = matrix_S * tl.cdiv(matrix_height, B) + (row_S - matrix_S * matrix_height) // B
    scale_ptrs = scales_ptr + expert * num_scales + block_row_S * num_columns + column
    scale_S = tl.load(scale_ptrs, mask=row_S < height, other=0.0)
    ok_SB = (row_S < height)[:, None] & (column_B < width)[None, :]
    code_ptrs = codes_ptr + expert * height * width + (row_S[:, None] * width + column_B[None, :])
    code_SB = tl.load(code_ptrs, mask=ok_SB, other=0).to(tl.int16)
    # the bits of e4m3 moved into those of float16 are the value over 2^8: exponents are biased by 7 and by 15
    bits_SB = ((code_SB & 0x80) << 8) | ((code_SB & 0x7F) << 7)
    value_SB = bits_SB.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    value_SB = tl.where((code_SB & 0x7F) == 0x7F, float("nan"), value_SB)
    out_ptrs = out_ptr + expert * stride_out + (row_S[:, None] * stride_row + column_B[None, :])
    tl.store(out_ptrs, (value_SB * scale_S[:, None]).to(out_ptr.dtype.element_ty), mask=ok_SB)


def decode(stack: Fp8, out_EOI: Tensor, end_E: Tensor | None = None) -> None:
    """All weights of a stack into `out_EOI`, (E, out, in) with rows of neighbors, in one launch.

    end_E: where each expert's rows end; experts without rows are left out.
    """
    num_experts, height, width = out_EOI.shape
    rows = VALUES // stack.block
    grid = (cdiv(height, rows) * cdiv(width, stack.block), num_experts)
    decode_fp8[grid](
        stack.codes, stack.scales, end_E, out_EOI, height, width, height // stack.matrices, stack.scales.shape[1],
        out_EOI.stride(0), out_EOI.stride(1),
        SKIP=end_E is not None, B=stack.block, S=rows, num_warps=4,
    )  # fmt: skip
