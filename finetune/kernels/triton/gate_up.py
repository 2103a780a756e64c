"""Gather, gate_up, its low-rank path and SwiGLU in one kernel: the rows are never gathered to memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import Inputs
from finetune.kernels.triton.project import LowRank
from finetune.kernels.triton.sizes import cdiv
from finetune.kernels.triton.swiglu import swiglu_parts
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


@triton.jit
def gate_up_rows(
    x_ptr, index_ptr, w_ptr, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, h_ptr, expert_ptr, row_ptr, end_ptr,
    stride_x, stride_we, stride_wn, stride_wk, stride_fx, stride_fn, stride_fr, depth, width, scale,
    FOLLOW: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`[g; u] = x [W | sB]^T` on `[x | z]` and `h = silu(g) u`; gate and up columns are interleaved inside a tile."""
    num_columns = tl.cdiv(width, N // 2)
    tile = tl.program_id(0) // num_columns
    expert = tl.load(expert_ptr + tile)
    if expert < 0:
        return
    first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
    first_column = (tl.program_id(0) % num_columns) * (N // 2)
    lane_N = tl.arange(0, N)
    ok_N = first_column + lane_N // 2 < width
    out_N = (lane_N % 2) * width + first_column + lane_N // 2
    x_ptrs_M = x_ptr + sources(row_M, index_ptr, FOLLOW) * stride_x
    w_ptrs_N = w_ptr + expert.to(tl.int64) * stride_we + out_N * stride_wn
    acc_MN = base_product(x_ptrs_M, w_ptrs_N, ok_N, stride_wk, depth, M, N, D, EVEN, WHOLE)
    if R > 0:
        slot = tl.load(slot_ptr + expert)
        acc_MN = low_rank_product(
            acc_MN, z_ptr, first, own_M, factor_ptr, out_N, ok_N, slot,
            stride_fx, stride_fn, stride_fr, scale, M, R, R2,
        )  # fmt: skip
    gate_MI, up_MI = tl.split(tl.reshape(acc_MN, (M, N // 2, 2)))
    lane_M, column_I = tl.arange(0, M), first_column + tl.arange(0, N // 2)
    ok_MI = stored(own_M, column_I < width, M, N // 2, WHOLE)
    if KEEP:
        gate_ptrs = gate_up_ptr + first * (2 * width) + (lane_M[:, None] * (2 * width) + column_I[None, :])
        tl.store(gate_ptrs, gate_MI.to(gate_up_ptr.dtype.element_ty), mask=ok_MI)
        tl.store(gate_ptrs + width, up_MI.to(gate_up_ptr.dtype.element_ty), mask=ok_MI)
    _, _, h_MI = swiglu_parts(gate_MI, up_MI)
    h_ptrs = h_ptr + first * width + (lane_M[:, None] * width + column_I[None, :])
    tl.store(h_ptrs, h_MI.to(h_ptr.dtype.element_ty), mask=ok_MI)


def gate_up(
    inputs: Inputs, weight_EGH: Tensor, low_rank: LowRank | None, tiling: Tiling, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """[gate; up] (P, 2I), empty unless kept, and h (P, I)."""
    x, shape = inputs.values, tiling.shape
    num_rows, width, depth = len(tiling.rows.pair_P), weight_EGH.shape[1] // 2, weight_EGH.shape[2]
    gate_up_PG = x.new_empty(num_rows if keep else 0, 2 * width)
    h_PI = x.new_empty(num_rows, width)
    z, factor, slot, scale = low_rank or (x, x.new_empty(0, 0, 0), tiling.expert_M, 0.0)
    rank = 0 if low_rank is None else factor.shape[2]
    index, follow = source_index(inputs, tiling.rows)
    gate_up_rows[tiling.grid(cdiv(width, shape.columns // 2))](
        x, index, weight_EGH, z, factor, slot, gate_up_PG, h_PI, *tiling.pointers,
        x.stride(0), *weight_EGH.stride(), *factor.stride(), depth, width, scale,
        FOLLOW=follow, KEEP=keep, R=rank, R2=padded_rank(rank), M=shape.rows, N=shape.columns, D=shape.depth,
        EVEN=depth % shape.depth == 0, WHOLE=width % (shape.columns // 2) == 0,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return gate_up_PG, h_PI
