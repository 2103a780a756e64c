"""The factors of all experts into the padding of their block matrices, in one pass over the parameters."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.layer import Factors
from finetune.kernels.triton.sizes import cdiv, power_of_2

COLUMNS = 128


@triton.jit
def copy_factor(
    factor_ptr, slot_ptr, padding_ptr, stride_x, stride_r, stride_n, stride_e, stride_br, stride_bn, width, scale,
    R: tl.constexpr, R2: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`padding[e, r, n] = scale F[slot of e, r, n]`, zero for a frozen expert and for r past the rank."""
    expert = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + expert)
    rank_R, column_N = tl.arange(0, R2), tl.program_id(1) * N + tl.arange(0, N)
    ok_N = column_N < width
    factor_ptrs = factor_ptr + slot * stride_x + rank_R[:, None] * stride_r + column_N[None, :] * stride_n
    held_RN = (rank_R < R)[:, None] & ok_N[None, :] & (slot >= 0)
    values_RN = tl.load(factor_ptrs, mask=held_RN, other=0.0).to(tl.float32) * scale
    padding_ptrs = padding_ptr + expert * stride_e + rank_R[:, None] * stride_br + column_N[None, :] * stride_bn
    rounded = (R + 7) // 8 * 8
    tl.store(padding_ptrs, values_RN.to(padding_ptr.dtype.element_ty), mask=(rank_R < rounded)[:, None] & ok_N[None, :])


def write_lora_padding(lora: Factors, a_ERI: Tensor, b_EOR: Tensor) -> None:
    """A into `a_ERI` and scale B into `b_EOR`, whose ranks are rounded up to a multiple of 8."""
    for factor, padding, scale in ((lora.a_XRI, a_ERI, 1.0), (lora.b_XOR.mT, b_EOR.mT, lora.scale)):
        _, rank, width = factor.shape
        grid = (len(padding), cdiv(width, COLUMNS))
        copy_factor[grid](
            factor, lora.slot_of_expert, padding, *factor.stride(), *padding.stride(), width, scale,
            R=rank, R2=max(8, power_of_2(rank)), N=COLUMNS, num_warps=4,
        )  # fmt: skip
