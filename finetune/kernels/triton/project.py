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
    readable_in_boxes,
    rows_of_tile,
    source_index,
    sources,
    stored,
)
from finetune.kernels.triton.walk import box_product, rows_box, used_tiles, weights_box


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
    stride_x, stride_we, stride_wn, stride_wk, stride_fx, stride_fn, stride_fr, stride_y,
    num_rows, depth, width, scale,
    FOLLOW: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, WALK: tl.constexpr, FLAT: tl.constexpr,
    E: tl.constexpr, E2: tl.constexpr, MIRRORED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`y[n, o] = sum_k x[n, k] W[e, o, k] + sum_r z[n, r] scale F[slot, o, r]`, e the expert of n."""
    num_columns = tl.cdiv(width, N)
    if WALK:
        x = rows_box(x_ptr, num_rows, depth, stride_x, FOLLOW, M, D)
        w = weights_box(w_ptr, width, depth, stride_we, stride_wn, stride_wk, E, N, D, MIRRORED)
        num_tiles = used_tiles(end_ptr, E, E2, M) * num_columns
        for at in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLAT):
            tile, column = at // num_columns, (at % num_columns) * N
            expert = tl.load(expert_ptr + tile)
            first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
            acc_MN = box_product(
                x, w, row_M, first.to(tl.int32), index_ptr, stride_x, expert, column, depth,
                FOLLOW, False, MIRRORED, M, N, D, EVEN,
            )  # fmt: skip
            store_rows(
                acc_MN, z_ptr, factor_ptr, slot_ptr, y_ptr, expert, first, own_M, column,
                stride_fx, stride_fn, stride_fr, stride_y, width, scale, R, R2, M, N, WHOLE,
            )  # fmt: skip
    else:
        tile, column = tl.program_id(0) // num_columns, (tl.program_id(0) % num_columns) * N
        expert = tl.load(expert_ptr + tile)
        if expert < 0:
            return
        first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
        column_N = column + tl.arange(0, N)
        x_ptrs_M = x_ptr + sources(row_M, index_ptr, FOLLOW) * stride_x
        w_ptrs_N = w_ptr + expert.to(tl.int64) * stride_we + column_N * stride_wn
        acc_MN = base_product(x_ptrs_M, w_ptrs_N, column_N < width, stride_wk, depth, M, N, D, EVEN, WHOLE)
        store_rows(
            acc_MN, z_ptr, factor_ptr, slot_ptr, y_ptr, expert, first, own_M, column,
            stride_fx, stride_fn, stride_fr, stride_y, width, scale, R, R2, M, N, WHOLE,
        )  # fmt: skip


@triton.jit
def store_rows(
    acc_MN, z_ptr, factor_ptr, slot_ptr, y_ptr, expert, first, own_M, column,
    stride_fx, stride_fn, stride_fr, stride_y, width, scale,
    R: tl.constexpr, R2: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The low-rank part of a tile, and the tile to memory."""
    column_N = column + tl.arange(0, N)
    ok_N = column_N < width
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
    x, (_, width, depth) = inputs.values, weight_EOK.shape
    mirrored = weight_EOK.stride(2) != 1
    shape = tiling.shapes.gate_up_back if mirrored else tiling.shapes.down
    shape = readable_in_boxes(shape, inputs, weight_EOK, mirrored=mirrored)
    num_rows = len(tiling.rows.pair_P)
    y_PO = x.new_empty(num_rows, width)
    z, factor, slot, scale = low_rank or (x, x.new_empty(0, 0, 0), tiling.expert_M, 0.0)
    rank = 0 if low_rank is None else factor.shape[2]
    index, follow = source_index(inputs, tiling.rows)
    tiling.launch(project_rows, shape, cdiv(width, shape.columns))(
        x, index, weight_EOK, z, factor, slot, y_PO, *tiling.pointers,
        x.stride(0), *weight_EOK.stride(), *factor.stride(), y_PO.stride(0), num_rows, depth, width, scale,
        FOLLOW=follow, R=rank, R2=padded_rank(rank), MIRRORED=mirrored,
        EVEN=depth % shape.depth == 0, WHOLE=width % shape.columns == 0, **tiling.constants(shape),
    )  # fmt: skip
    return y_PO
