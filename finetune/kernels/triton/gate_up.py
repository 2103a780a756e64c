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
    readable_in_boxes,
    rows_of_tile,
    source_index,
    sources,
    stored,
)
from finetune.kernels.triton.walk import box_product, gate_up_box, rows_box, used_tiles


@triton.jit
def gate_up_rows(
    x_ptr, index_ptr, w_ptr, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, h_ptr, expert_ptr, row_ptr, end_ptr,
    stride_x, stride_we, stride_wn, stride_wk, stride_fx, stride_fn, stride_fr, num_rows, depth, width, scale,
    FOLLOW: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    WALK: tl.constexpr, FLAT: tl.constexpr, E: tl.constexpr, E2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`[g; u] = x [W | sB]^T` on `[x | z]` and `h = silu(g) u`; a tile has as many columns of gate as of up."""
    num_columns = tl.cdiv(width, N // 2)
    if WALK:
        x = rows_box(x_ptr, num_rows, depth, stride_x, FOLLOW, M, D)
        w = gate_up_box(w_ptr, width, depth, stride_we, stride_wn, E, N, D)
        num_tiles = used_tiles(end_ptr, E, E2, M) * num_columns
        for at in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLAT):
            tile, column = at // num_columns, (at % num_columns) * (N // 2)
            expert = tl.load(expert_ptr + tile)
            first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
            acc_MN = box_product(
                x, w, row_M, first.to(tl.int32), index_ptr, stride_x, expert, column, depth,
                FOLLOW, True, False, M, N, D, EVEN,
            )  # fmt: skip
            store_gate_up(
                acc_MN, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, h_ptr, expert, first, own_M, column,
                stride_fx, stride_fn, stride_fr, width, scale, KEEP, R, R2, True, M, N, WHOLE,
            )  # fmt: skip
    else:
        tile, column = tl.program_id(0) // num_columns, (tl.program_id(0) % num_columns) * (N // 2)
        expert = tl.load(expert_ptr + tile)
        if expert < 0:
            return
        first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
        ok_N = column + tl.arange(0, N) // 2 < width
        x_ptrs_M = x_ptr + sources(row_M, index_ptr, FOLLOW) * stride_x
        w_ptrs_N = w_ptr + expert.to(tl.int64) * stride_we + gate_up_lanes(column, width, N, False) * stride_wn
        acc_MN = base_product(x_ptrs_M, w_ptrs_N, ok_N, stride_wk, depth, M, N, D, EVEN, WHOLE)
        store_gate_up(
            acc_MN, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, h_ptr, expert, first, own_M, column,
            stride_fx, stride_fn, stride_fr, width, scale, KEEP, R, R2, False, M, N, WHOLE,
        )  # fmt: skip


@triton.jit
def gate_up_lanes(column, width, N: tl.constexpr, PAIRED: tl.constexpr):
    """Rows of [gate; up] in a tile: N / 2 of gate, then N / 2 of up when PAIRED; else the two interleaved.

    Either way the two of a pair are in one thread's part of the accumulator, and splitting them moves nothing.
    """
    lane_N = tl.arange(0, N)
    if PAIRED:
        out_N = (lane_N // (N // 2)) * width + column + lane_N % (N // 2)
    else:
        out_N = (lane_N % 2) * width + column + lane_N // 2
    return out_N


@triton.jit
def store_gate_up(
    acc_MN, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, h_ptr, expert, first, own_M, column,
    stride_fx, stride_fn, stride_fr, width, scale,
    KEEP: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, PAIRED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The low-rank part of a tile, SwiGLU, and both to memory."""
    if R > 0:
        lane_N = tl.arange(0, N)
        ok_N = column + (lane_N % (N // 2) if PAIRED else lane_N // 2) < width
        slot = tl.load(slot_ptr + expert)
        acc_MN = low_rank_product(
            acc_MN, z_ptr, first, own_M, factor_ptr, gate_up_lanes(column, width, N, PAIRED), ok_N, slot,
            stride_fx, stride_fn, stride_fr, scale, M, R, R2,
        )  # fmt: skip
    if PAIRED:
        gate_MI, up_MI = halves(acc_MN, M, N)
    else:
        gate_MI, up_MI = tl.split(tl.reshape(acc_MN, (M, N // 2, 2)))
    if PAIRED and N > 128:
        gate_2, up_2 = halves(gate_MI, M, N // 2), halves(up_MI, M, N // 2)  # a whole one spilled 16 bytes
        for half in tl.static_range(2):
            store_swiglu(
                gate_2[half], up_2[half], gate_up_ptr, h_ptr, first, own_M, column + half * (N // 4), width,
                KEEP, M, N // 4, WHOLE,
            )  # fmt: skip
    else:
        store_swiglu(gate_MI, up_MI, gate_up_ptr, h_ptr, first, own_M, column, width, KEEP, M, N // 2, WHOLE)


@triton.jit
def halves(tile_MN, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile_MN, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def store_swiglu(
    gate_MI, up_MI, gate_up_ptr, h_ptr, first, own_M, column, width,
    KEEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gate, up and `silu(gate) up` to memory."""
    lane_M, column_I = tl.arange(0, M), column + tl.arange(0, N)
    ok_MI = stored(own_M, column_I < width, M, N, WHOLE)
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
    x, shape = inputs.values, readable_in_boxes(tiling.shapes.gate_up, inputs, weight_EGH, mirrored=False)
    num_rows, width, depth = len(tiling.rows.pair_P), weight_EGH.shape[1] // 2, weight_EGH.shape[2]
    gate_up_PG = x.new_empty(num_rows if keep else 0, 2 * width)
    h_PI = x.new_empty(num_rows, width)
    z, factor, slot, scale = low_rank or (x, x.new_empty(0, 0, 0), tiling.expert_M, 0.0)
    rank = 0 if low_rank is None else factor.shape[2]
    index, follow = source_index(inputs, tiling.rows)
    tiling.launch(gate_up_rows, shape, cdiv(width, shape.columns // 2))(
        x, index, weight_EGH, z, factor, slot, gate_up_PG, h_PI, *tiling.pointers,
        x.stride(0), *weight_EGH.stride(), *factor.stride(), num_rows, depth, width, scale,
        FOLLOW=follow, KEEP=keep, R=rank, R2=padded_rank(rank),
        EVEN=depth % shape.depth == 0, WHOLE=width % (shape.columns // 2) == 0, **tiling.constants(shape),
    )  # fmt: skip
    return gate_up_PG, h_PI
