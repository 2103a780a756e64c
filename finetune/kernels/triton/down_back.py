"""Back through down and SwiGLU in one kernel: the gradient of h never reaches memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import Inputs, SwigluGradients
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
from finetune.kernels.triton.walk import box_product, rows_box, used_tiles, weights_box

CHUNK = 32
"""Columns of the epilogue held in registers at once."""


@triton.jit
def down_back_rows(
    d_y_ptr, index_ptr, w_ptr, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, weight_ptr, pair_ptr,
    d_gate_up_ptr, weighted_h_ptr, d_weight_ptr, expert_ptr, row_ptr, end_ptr,
    stride_d_y, stride_we, stride_wn, stride_wk, stride_fx, stride_fn, stride_fr, num_rows, depth, width, scale,
    FOLLOW: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, C: tl.constexpr,
    WALK: tl.constexpr, FLAT: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, MIRRORED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`dh = [dy | dz] [W; A]`; `dg = w dh u silu'(g)`, `du = w dh silu(g)`, `wh = w h`, `dw[tile] = <h, dh>`."""
    num_columns = tl.cdiv(width, N)
    if WALK:
        d_y = rows_box(d_y_ptr, num_rows, depth, stride_d_y, FOLLOW, M, D)
        w = weights_box(w_ptr, width, depth, stride_we, stride_wn, stride_wk, E, N, D, MIRRORED)
        num_tiles = used_tiles(end_ptr, E, E2, M) * num_columns
        for at in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLAT):
            tile, column_tile = at // num_columns, at % num_columns
            expert = tl.load(expert_ptr + tile)
            first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
            d_h_MN = box_product(
                d_y, w, row_M, first.to(tl.int32), index_ptr, stride_d_y, expert, column_tile * N, depth,
                FOLLOW, False, MIRRORED, M, N, D, EVEN,
            )  # fmt: skip
            store_down_back(
                d_h_MN, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, weight_ptr, pair_ptr,
                d_gate_up_ptr, weighted_h_ptr, d_weight_ptr, expert, first, row_M, own_M, column_tile, num_columns,
                stride_fx, stride_fn, stride_fr, width, scale, R, R2, C, M, N, WHOLE,
            )  # fmt: skip
    else:
        tile, column_tile = tl.program_id(0) // num_columns, tl.program_id(0) % num_columns
        expert = tl.load(expert_ptr + tile)
        if expert < 0:
            return
        first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
        column_N = column_tile * N + tl.arange(0, N)
        d_y_ptrs_M = d_y_ptr + sources(row_M, index_ptr, FOLLOW) * stride_d_y
        w_ptrs_N = w_ptr + expert.to(tl.int64) * stride_we + column_N * stride_wn
        d_h_MN = base_product(d_y_ptrs_M, w_ptrs_N, column_N < width, stride_wk, depth, M, N, D, EVEN, WHOLE)
        store_down_back(
            d_h_MN, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, weight_ptr, pair_ptr,
            d_gate_up_ptr, weighted_h_ptr, d_weight_ptr, expert, first, row_M, own_M, column_tile, num_columns,
            stride_fx, stride_fn, stride_fr, width, scale, R, R2, C, M, N, WHOLE,
        )  # fmt: skip


@triton.jit
def store_down_back(
    d_h_MN, z_ptr, factor_ptr, slot_ptr, gate_up_ptr, weight_ptr, pair_ptr,
    d_gate_up_ptr, weighted_h_ptr, d_weight_ptr, expert, first, row_M, own_M, column_tile, num_columns,
    stride_fx, stride_fn, stride_fr, width, scale,
    R: tl.constexpr, R2: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The low-rank part of a tile, SwiGLU's gradient, and all of it to memory."""
    column_N = column_tile * N + tl.arange(0, N)
    ok_N = column_N < width
    if R > 0:
        slot = tl.load(slot_ptr + expert)
        d_h_MN = low_rank_product(
            d_h_MN, z_ptr, first, own_M, factor_ptr, column_N, ok_N, slot,
            stride_fx, stride_fn, stride_fr, scale, M, R, R2,
        )  # fmt: skip
    lane_M = tl.arange(0, M)
    d_h_ptrs = weighted_h_ptr + first * width + (lane_M[:, None] * width + column_N[None, :])
    tl.store(d_h_ptrs, d_h_MN.to(weighted_h_ptr.dtype.element_ty), mask=stored(own_M, ok_N, M, N, WHOLE))
    tl.debug_barrier()  # dh waits where wh will be: all of the epilogue on one tile does not fit the registers
    pair_M = tl.load(pair_ptr + row_M)
    weight_M1 = tl.load(weight_ptr + pair_M).to(tl.float32)[:, None]
    d_weight_M = tl.zeros((M,), dtype=tl.float32)
    for start in range(0, N, C):
        column_C = column_tile * N + start + tl.arange(0, C)
        ok_MC = stored(own_M, column_C < width, M, C, WHOLE)
        weighted_h_ptrs = weighted_h_ptr + first * width + (lane_M[:, None] * width + column_C[None, :])
        at_MC = first * (2 * width) + (lane_M[:, None] * (2 * width) + column_C[None, :])
        d_h_MC = tl.load(weighted_h_ptrs, mask=ok_MC, other=0.0).to(tl.float32)
        gate_MC = tl.load(gate_up_ptr + at_MC, mask=ok_MC, other=0.0).to(tl.float32)
        up_MC = tl.load(gate_up_ptr + at_MC + width, mask=ok_MC, other=0.0).to(tl.float32)
        silu_MC, slope_MC, h_MC = swiglu_parts(gate_MC, up_MC)
        d_weight_M += tl.sum(h_MC * d_h_MC, axis=1)
        tl.store(weighted_h_ptrs, (h_MC * weight_M1).to(weighted_h_ptr.dtype.element_ty), mask=ok_MC)
        d_h_MC *= weight_M1
        d_gate_MC, d_up_MC = d_h_MC * up_MC * slope_MC, d_h_MC * silu_MC
        tl.store(d_gate_up_ptr + at_MC, d_gate_MC.to(d_gate_up_ptr.dtype.element_ty), mask=ok_MC)
        tl.store(d_gate_up_ptr + at_MC + width, d_up_MC.to(d_gate_up_ptr.dtype.element_ty), mask=ok_MC)
    tl.store(d_weight_ptr + pair_M * num_columns + column_tile, d_weight_M, mask=own_M)


def down_back(
    d_y: Inputs, weight_EIH: Tensor, low_rank: LowRank | None, saved: tuple[Tensor, Tensor], tiling: Tiling
) -> SwigluGradients:
    """Gradients of [gate; up] and of the rows' routing weights, and w h.

    d_y: gradient of each row's output before the routing weight. weight_EIH: the transposed bank.
    saved: [gate; up] (P, 2I) and the routing weights (T, K).
    """
    (gate_up_PG, weights_TK), rows = saved, tiling.rows
    mirrored = weight_EIH.stride(2) != 1
    shape = readable_in_boxes(tiling.shapes.down_back, d_y, weight_EIH, mirrored=mirrored)
    num_rows, (_, width, depth) = len(rows.pair_P), weight_EIH.shape
    num_columns = cdiv(width, shape.columns)
    d_gate_up_PG, weighted_h_PI = torch.empty_like(gate_up_PG), gate_up_PG.new_empty(num_rows, width)
    d_weight_PC = gate_up_PG.new_empty(num_rows, num_columns, dtype=torch.float32)
    d_out = d_y.values
    z, factor, slot, scale = low_rank or (d_out, d_out.new_empty(0, 0, 0), tiling.expert_M, 0.0)
    rank = 0 if low_rank is None else factor.shape[2]
    index, follow = source_index(d_y, rows)
    tiling.launch(down_back_rows, shape, num_columns)(
        d_out, index, weight_EIH, z, factor, slot, gate_up_PG, weights_TK, rows.pair_P,
        d_gate_up_PG, weighted_h_PI, d_weight_PC, *tiling.pointers,
        d_out.stride(0), *weight_EIH.stride(), *factor.stride(), num_rows, depth, width, scale,
        FOLLOW=follow, R=rank, R2=padded_rank(rank), C=CHUNK, MIRRORED=mirrored,
        EVEN=depth % shape.depth == 0, WHOLE=width % shape.columns == 0, **tiling.constants(shape),
    )  # fmt: skip
    return SwigluGradients(d_gate_up_PG, weighted_h_PI, d_weight_PC.sum(1))
