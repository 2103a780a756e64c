"""Gradients of A and B for trained slots only, one program per slot and block of columns: no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import Inputs
from finetune.kernels.sorted_rows import SortedRows
from finetune.kernels.triton.shapes import depth_for
from finetune.kernels.triton.sizes import cdiv
from finetune.kernels.triton.tiles import padded_rank, source_index, sources

COLUMNS, DEPTH = 128, 64


@triton.jit
def sum_outer(
    thin_ptr, wide_ptr, index_ptr, slot_ptr, end_ptr, grad_ptr,
    stride_thin, stride_wide, stride_gx, stride_gr, stride_gn, width, scale,
    FOLLOW: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`G[slot, r, n] = scale sum_{rows of the slot's expert} thin[row, r] wide[row, n]`, summed in fp32."""
    expert = tl.program_id(0)
    slot = tl.load(slot_ptr + expert)
    if slot < 0:
        return
    end = tl.load(end_ptr + expert)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    rank_R, column_N, step_D = tl.arange(0, R2), tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, D)
    acc_NR = tl.zeros((N, R2), dtype=tl.float32)
    for first in range(start, end, D):
        row_D = (first + step_D).to(tl.int64)
        own_D = row_D < end
        row_D = tl.minimum(row_D, end - 1)
        thin_ptrs = thin_ptr + row_D[:, None] * stride_thin + rank_R[None, :]
        thin_DR = tl.load(thin_ptrs, mask=own_D[:, None] & (rank_R < R)[None, :], other=0.0)
        wide_ptrs = wide_ptr + sources(row_D, index_ptr, FOLLOW)[:, None] * stride_wide + column_N[None, :]
        wide_DN = tl.load(wide_ptrs, mask=(column_N < width)[None, :], other=0.0)
        acc_NR = tl.dot(tl.trans(wide_DN), thin_DR, acc_NR, input_precision="ieee")
    grad_ptrs = grad_ptr + slot * stride_gx + rank_R[None, :] * stride_gr + column_N[:, None] * stride_gn
    ok_NR = (column_N < width)[:, None] & (rank_R < R)[None, :]
    tl.store(grad_ptrs, (acc_NR * scale).to(grad_ptr.dtype.element_ty), mask=ok_NR)


def factor_grad_(
    grad_XRN: Tensor, thin_PR: Tensor, wide: Inputs, slot_E: Tensor, rows: SortedRows, scale: float = 1.0
) -> None:
    """The gradient of A, or of B with its last two dimensions swapped, into `grad_XRN`; zero for experts without rows.

    thin_PR: may have more columns than the rank, which are not read.
    """
    _, rank, width = grad_XRN.shape
    index, follow = source_index(wide, rows)
    grid = (len(slot_E), cdiv(width, COLUMNS))
    sum_outer[grid](
        thin_PR, wide.values, index, slot_E, rows.end_E, grad_XRN,
        thin_PR.stride(0), wide.values.stride(0), *grad_XRN.stride(), width, scale,
        FOLLOW=follow, R=rank, R2=padded_rank(rank), N=COLUMNS, D=depth_for(DEPTH, thin_PR.dtype), num_warps=4,
    )  # fmt: skip
