"""What the grouped products share: how rows are cut into tiles, and the inner loops of one tile.

A tile is up to M rows of one expert times N columns. Rows past the expert's last are computed from its last row and
not stored, so loads need no row mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import Inputs
from finetune.kernels.sorted_rows import SortedRows
from finetune.kernels.triton import routing
from finetune.kernels.triton.shapes import Shape, Shapes, Workload, multiprocessors, shape_for, shapes_for
from finetune.kernels.triton.sizes import power_of_2

THIN_DEPTH = 64
MIN_RANK = 16
"""The narrowest operand of a tensor-core product; lower ranks are padded with zeros inside the tile."""


def sorted_tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows of the tiles that are mapped while the rows are sorted; the same forward and backward, tuned or not."""
    return shape_for(num_rows, num_experts).rows


@dataclass(frozen=True)
class Tiling:
    """Tiles of all rows of one call: expert and first row of each, expert -1 for tiles that are not needed."""

    shapes: Shapes
    rows: SortedRows
    expert_M: Tensor
    row_M: Tensor

    @classmethod
    def of(cls, rows: SortedRows, workload: Workload) -> Tiling:
        """Tiles of the shapes for the workload and the average load."""
        num_rows, num_experts = rows.pair_P.shape[0], rows.end_E.shape[0]
        shapes = shapes_for(num_rows, workload)
        mapped = routing.tiles_of_rows(rows, sorted_tile_rows(num_rows, num_experts), shapes.tile_rows)
        return cls(shapes, rows, *mapped)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `rows_of_tile` reads."""
        return self.expert_M, self.row_M, self.rows.end_E

    def grid(self, num_column_tiles: int) -> tuple[int]:
        """One program for each tile; those of one block of rows are neighbors and share it in cache."""
        return (len(self.expert_M) * num_column_tiles,)

    def launch(self, kernel: Any, shape: Shape, num_column_tiles: int) -> Callable[..., object]:
        """A kernel on as many programs as the shape asks for."""
        (tiles,) = self.grid(num_column_tiles)
        if not shape.programs:
            return kernel[(tiles,)]
        triton.set_allocator(_scratch)  # a setting of the thread, and backward has its own
        return kernel[(min(tiles, multiprocessors(self.expert_M.device) * shape.programs),)]

    def constants(self, shape: Shape) -> dict[str, Any]:
        """What a grouped product is compiled with; the number of experts only where it is needed."""
        return shape.constants | _experts(len(self.rows.end_E) if shape.programs else 0)


@cache
def _experts(num_experts: int) -> dict[str, int]:
    return {"E": num_experts, "E2": power_of_2(num_experts)}


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory for TMA descriptors, 128 bytes each; from torch's allocator, whose reuse follows the stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def readable_in_boxes(shape: Shape, inputs: Inputs, weight_EOK: Tensor, *, mirrored: bool) -> Shape:
    """The shape, or the one with pointers where rows or weights do not lie as TMA descriptors demand.

    They demand addresses and strides of whole 16 bytes, and neighbors along one dimension: K, or O when mirrored.
    """
    if not shape.programs:
        return shape
    x, per_line = inputs.values, 16 // weight_EOK.element_size()
    stride_e, stride_o, stride_k = weight_EOK.stride()
    neighbors, line = (stride_o, stride_k) if mirrored else (stride_k, stride_o)
    lines = [stride_e, line, weight_EOK.storage_offset()]
    if inputs.source is None:
        lines += [x.stride(0), x.storage_offset()]
    fits = neighbors == 1 and x.numel() > 0 and not any(line % per_line for line in lines)
    return shape if fits else shape.pointed


def padded_rank(rank: int) -> int:
    """The rank as a tile sees it."""
    return max(MIN_RANK, power_of_2(rank))


def source_index(inputs: Inputs, rows: SortedRows) -> tuple[Tensor, bool]:
    """A pointer for the index and whether to follow it."""
    return (rows.pair_P, False) if inputs.source is None else (inputs.source, True)


@triton.jit
def rows_of_tile(tile, expert, row_ptr, end_ptr, M: tl.constexpr):
    """The first row of a tile, all of them with those past the expert's last replaced by it, and which are its own."""
    first = tl.load(row_ptr + tile)
    row_M, end = first + tl.arange(0, M), tl.load(end_ptr + expert)
    return first.to(tl.int64), tl.minimum(row_M, end - 1), row_M < end


@triton.jit
def stored(own_M, ok_N, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr):
    """Which cells of a tile to store; no test of columns when all are there."""
    return own_M[:, None] if WHOLE else own_M[:, None] & ok_N[None, :]


@triton.jit
def sources(row_M, index_ptr, FOLLOW: tl.constexpr):
    """Where the rows are read: `index[row]` or the row itself."""
    return tl.load(index_ptr + row_M).to(tl.int64) if FOLLOW else row_M.to(tl.int64)


@triton.jit
def base_product(
    x_ptrs_M, w_ptrs_N, ok_N, stride_wk, depth,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`acc[m, n] = sum_k x[m, k] w[n, k]` in fp32. EVEN: D divides the depth. WHOLE: all columns are there."""
    step_D = tl.arange(0, D)
    x_ptrs = x_ptrs_M[:, None] + step_D[None, :]
    w_ptrs = w_ptrs_N[None, :] + step_D[:, None] * stride_wk
    acc_MN = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, depth, D):
        ok_D = step_D < depth - start
        x_MD = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=ok_D[None, :], other=0.0)
        if EVEN and WHOLE:
            w_DN = tl.load(w_ptrs)
        elif EVEN:
            w_DN = tl.load(w_ptrs, mask=ok_N[None, :], other=0.0)
        else:
            w_DN = tl.load(w_ptrs, mask=ok_N[None, :] & ok_D[:, None], other=0.0)
        acc_MN = tl.dot(x_MD, w_DN, acc_MN, input_precision="ieee")
        x_ptrs += D
        w_ptrs += D * stride_wk
    return acc_MN


@triton.jit
def low_rank_product(
    acc_MN, z_ptr, first, own_M, factor_ptr, column_N, ok_N, slot, stride_x, stride_n, stride_r, scale,
    M: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
):  # fmt: skip
    """`acc[m, n] + sum_r z[m, r] scale F[slot, n, r]`, one more step of the sum; a frozen expert adds zero.

    slot: of the tile's expert, -1 for a frozen one, whose rows of z are not read.
    """
    rank_R = tl.arange(0, R2)
    ok_R = (rank_R < R) & (slot >= 0)
    z_ptrs = z_ptr + first * R + (tl.arange(0, M)[:, None] * R + rank_R[None, :])
    z_MR = tl.load(z_ptrs, mask=own_M[:, None] & ok_R[None, :], other=0.0)
    factor_ptrs = factor_ptr + slot.to(tl.int64) * stride_x + column_N[None, :] * stride_n + rank_R[:, None] * stride_r
    factor_RN = tl.load(factor_ptrs, mask=ok_R[:, None] & ok_N[None, :], other=0.0) * scale
    return tl.dot(z_MR, factor_RN.to(z_MR.dtype), acc_MN, input_precision="ieee")
