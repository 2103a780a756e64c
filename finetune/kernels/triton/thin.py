"""The narrow products of the factors: rows into rank space, forward through A and backward through B."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import Inputs
from finetune.kernels.triton.shapes import depth_for
from finetune.kernels.triton.tiles import (
    THIN_DEPTH,
    Tiling,
    padded_rank,
    rows_of_tile,
    source_index,
    sources,
)


@triton.jit
def into_rank(
    x_ptr, index_ptr, factor_ptr, slot_ptr, z_ptr, expert_ptr, row_ptr, end_ptr,
    stride_x, stride_fx, stride_fr, stride_fk, depth, scale,
    FOLLOW: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`z[n, r] = scale sum_k x[n, k] F[slot of n's expert, r, k]`; rows of frozen experts are left as they were."""
    tile = tl.program_id(0)
    expert = tl.load(expert_ptr + tile)
    if expert < 0:
        return
    slot = tl.load(slot_ptr + expert)
    if slot < 0:
        return
    first, row_M, own_M = rows_of_tile(tile, expert, row_ptr, end_ptr, M)
    step_D, rank_R = tl.arange(0, D), tl.arange(0, R2)
    x_ptrs = x_ptr + sources(row_M, index_ptr, FOLLOW)[:, None] * stride_x + step_D[None, :]
    factor_ptrs = factor_ptr + slot * stride_fx + rank_R[None, :] * stride_fr + step_D[:, None] * stride_fk
    acc_MR = tl.zeros((M, R2), dtype=tl.float32)
    for start in range(0, depth, D):
        ok_D = step_D < depth - start
        x_MD = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=ok_D[None, :], other=0.0)
        factor_DR = tl.load(factor_ptrs, mask=(rank_R < R)[None, :] & ok_D[:, None], other=0.0)
        acc_MR = tl.dot(x_MD, factor_DR.to(x_MD.dtype), acc_MR, input_precision="ieee")
        x_ptrs += D
        factor_ptrs += D * stride_fk
    z_ptrs = z_ptr + first * R + (tl.arange(0, M)[:, None] * R + rank_R[None, :])
    tl.store(z_ptrs, (acc_MR * scale).to(z_ptr.dtype.element_ty), mask=own_M[:, None] & (rank_R < R)[None, :])


def thin(inputs: Inputs, factor_XRK: Tensor, slot_E: Tensor, tiling: Tiling, scale: float) -> Tensor:
    """z, (P, R) in the rows' type, unwritten for frozen experts.

    factor_XRK: A as it is, or B with its last two dimensions swapped; any strides, any type.
    """
    x, (_, rank, depth) = inputs.values, factor_XRK.shape
    z_PR = x.new_empty(len(tiling.rows.pair_P), rank)
    (index, follow), step = source_index(inputs, tiling.rows), depth_for(THIN_DEPTH, x.dtype)
    into_rank[tiling.grid(1)](
        x, index, factor_XRK, slot_E, z_PR, *tiling.pointers,
        x.stride(0), *factor_XRK.stride(), depth, scale,
        FOLLOW=follow, R=rank, R2=padded_rank(rank), M=tiling.shapes.tile_rows, D=step, EVEN=depth % step == 0,
        num_warps=4,
    )  # fmt: skip
    return z_PR
