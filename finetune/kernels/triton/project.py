"""Grouped products over all experts with the low-rank path inside: down forward, gate_up backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import Inputs
from finetune.kernels.triton.sizes import cdiv
from finetune.kernels.triton.tiles import (
    Tiling,
    base_product,
    low_rank_product,
    padded_rank,
    rows_of_tile,
    source_index,
    sources,
    stored,
)


class LowRank(NamedTuple):
    """What a product adds: `z[n, r] scale F[slot of n's expert, o, r]`.

    z_PR: (P, R). factor_XOR: B as it is, or A with its last two dimensions swapped. slot_E: -1 for frozen experts.
    """

    z_PR: Tensor
    factor_XOR: Tensor
    slot_E: Tensor
    scale: float


@triton.jit
def project_rows(
    x_ptr, index_ptr, w_ptr, z_ptr, factor_ptr, slot_ptr, y_ptr, expert_ptr, row_ptr, end_ptr,
    stride_x, stride_we, stride_wn, stride_wk, stride_fx, stride_fn, stride_fr, stride_y, depth, width, scale,
    FOLLOW: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`y[n, o] = sum_k x[n, k] W[e, o, k] + sum_r z[n, r] scale F[slot, o, r]`, e the expert of n."""
    num_columns = tl.cdiv(width, N)
    tile = tl.program_id(0) // num_columns
    expert = tl.load(expert_ptr + tile)
    if expert < 0:
        return
    first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
    column_N = (tl.program_id(0) % num_columns) * N + tl.arange(0, N)
    ok_N = column_N < width
    x_ptrs_M = x_ptr + sources(row_M, index_ptr, FOLLOW) * stride_x
    w_ptrs_N = w_ptr + expert.to(tl.int64) * stride_we + column_N * stride_wn
    acc_MN = base_product(x_ptrs_M, w_ptrs_N, ok_N, stride_wk, depth, M, N, D, EVEN, WHOLE)
    if R > 0:
        slot = tl.load(slot_ptr + expert)
        acc_MN = low_rank_product(
            acc_MN, z_ptr, first, own_M, factor_ptr, column_N, ok_N, slot,
            stride_fx, stride_fn, stride_fr, scale, M, R, R2,
        )  # fmt: skip
    y_ptrs = y_ptr + first * stride_y + (tl.arange(0, M)[:, None] * stride_y + column_N[None, :])
    tl.store(y_ptrs, acc_MN.to(y_ptr.dtype.element_ty), mask=stored(own_M, ok_N, M, N, WHOLE))


def project(inputs: Inputs, weight_EOK: Tensor, low_rank: LowRank | None, tiling: Tiling) -> Tensor:
    """y, (P, O) in the rows' type. weight_EOK: any strides, so also a transposed bank."""
    x, shape = inputs.values, tiling.shape
    _, width, depth = weight_EOK.shape
    y_PO = x.new_empty(len(tiling.rows.pair_P), width)
    z, factor, slot, scale = low_rank or (x, x.new_empty(0, 0, 0), tiling.expert_M, 0.0)
    rank = 0 if low_rank is None else factor.shape[2]
    index, follow = source_index(inputs, tiling.rows)
    project_rows[tiling.grid(cdiv(width, shape.columns))](
        x, index, weight_EOK, z, factor, slot, y_PO, *tiling.pointers,
        x.stride(0), *weight_EOK.stride(), *factor.stride(), y_PO.stride(0), depth, width, scale,
        FOLLOW=follow, R=rank, R2=padded_rank(rank), M=shape.rows, N=shape.columns, D=shape.depth,
        EVEN=depth % shape.depth == 0, WHOLE=width % shape.columns == 0,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return y_PO
