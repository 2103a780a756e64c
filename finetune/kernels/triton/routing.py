"""Where token-expert pairs go: histogram, prefix sum and scatter, deterministic and without a host read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.sorted_rows import SortedRows, order_size
from finetune.kernels.triton.sizes import cdiv, power_of_2

CHUNK = 64
"""Pairs compared with all experts at once."""

PREFIX_CHUNK = 32
"""Blocks summed at once."""

BLOCK, MAX_BLOCKS = 1024, 256
"""Pairs of one program, and programs that still get no more than that; each of them reads the counts of all."""


@triton.jit
def has_rows(end_ptr, expert):
    """Whether any row is an expert's."""
    return tl.load(end_ptr + expert) > tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)


@triton.jit
def count_pairs(index_ptr, count_ptr, num_pairs, block_pairs, E: tl.constexpr, E2: tl.constexpr, C: tl.constexpr):
    """`count[b, e] = |{p in block b: index[p] = e}|`."""
    block, expert_E = tl.program_id(0), tl.arange(0, E2)
    total_E = tl.zeros((E2,), dtype=tl.int32)
    for start in range(0, tl.minimum(block_pairs, num_pairs - block * block_pairs), C):
        pair_C = block * block_pairs + start + tl.arange(0, C)
        index_C = tl.load(index_ptr + pair_C, mask=pair_C < num_pairs, other=-1).to(tl.int32)
        total_E += tl.sum((index_C[:, None] == expert_E[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + block * E + expert_E, total_E, mask=expert_E < E)


@triton.jit
def tiles_of(tile_C, total_E, end_E, M: tl.constexpr, E: tl.constexpr, E2: tl.constexpr):
    """`expert[m] = |{e: sum_{e' <= e} ceil(n_e' / M) <= m}|`, -1 past the last, and `row[m]`, the tile's first row."""
    expert_E = tl.arange(0, E2)
    tiles_E = tl.where(expert_E < E, (total_E + M - 1) // M, 0)
    past_E = tl.cumsum(tiles_E, axis=0)
    expert_C = tl.sum(((past_E[None, :] <= tile_C[:, None]) & (expert_E[None, :] < E)).to(tl.int32), axis=1)
    own_CE = (expert_C[:, None] == expert_E[None, :]).to(tl.int32)
    first_C = tl.sum(own_CE * (past_E - tiles_E)[None, :], axis=1)
    row_C = tl.sum(own_CE * (end_E - total_E)[None, :], axis=1) + (tile_C - first_C) * M
    return tl.where(expert_C < E, expert_C, -1), row_C


@triton.jit
def place_pairs(
    index_ptr, count_ptr, order_ptr, num_pairs, block_pairs, num_blocks, num_tiles,
    K: tl.constexpr, M: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`row[p] = end[e - 1] + |{p' < p: index[p'] = e}|` with e = index[p], `pair[row[p]] = p`, `end`, and the tiles.

    order_ptr: pair, row, token, end, then expert and first row of each tile (M > 0). B: blocks summed at once.
    """
    block, expert_E = tl.program_id(0), tl.arange(0, E2)
    total_E, next_E = tl.zeros((E2,), dtype=tl.int32), tl.zeros((E2,), dtype=tl.int32)
    for first in range(0, num_blocks, B):
        block_B = first + tl.arange(0, B)
        ok_BE = (block_B[:, None] < num_blocks) & (expert_E[None, :] < E)
        count_BE = tl.load(count_ptr + block_B[:, None] * E + expert_E[None, :], mask=ok_BE, other=0)
        total_E += tl.sum(count_BE, axis=0)
        next_E += tl.sum(tl.where(block_B[:, None] < block, count_BE, 0), axis=0)
    end_E = tl.cumsum(total_E, axis=0)
    next_E += end_E - total_E
    end_ptr = order_ptr + 3 * num_pairs
    if block == 0:
        tl.store(end_ptr + expert_E, end_E, mask=expert_E < E)
    for start in range(0, tl.minimum(block_pairs, num_pairs - block * block_pairs), C):
        pair_C = block * block_pairs + start + tl.arange(0, C)
        ok_C = pair_C < num_pairs
        index_C = tl.load(index_ptr + pair_C, mask=ok_C, other=-1).to(tl.int32)
        hit_CE = (index_C[:, None] == expert_E[None, :]).to(tl.int32)
        before_CE = next_E[None, :] + tl.cumsum(hit_CE, axis=0) - hit_CE
        row_C = tl.sum(hit_CE * before_CE, axis=1)
        tl.store(order_ptr + row_C, pair_C, mask=ok_C)
        tl.store(order_ptr + num_pairs + pair_C, row_C, mask=ok_C)
        tl.store(order_ptr + 2 * num_pairs + row_C, pair_C // K, mask=ok_C)
        next_E += tl.sum(hit_CE, axis=0)
    if M > 0:
        own_tiles = tl.cdiv(num_tiles, num_blocks)
        last = tl.minimum((block + 1) * own_tiles, num_tiles)
        for first in range(block * own_tiles, last, C):
            tile_C = first + tl.arange(0, C)
            expert_C, row_C = tiles_of(tile_C, total_E, end_E, M, E, E2)
            tl.store(end_ptr + E + tile_C, expert_C, mask=tile_C < last)
            tl.store(end_ptr + E + num_tiles + tile_C, row_C, mask=tile_C < last)


@triton.jit
def map_tiles(
    end_ptr, expert_ptr, row_ptr, num_tiles, E: tl.constexpr, E2: tl.constexpr, M: tl.constexpr, C: tl.constexpr
):
    """`expert[m] = |{e: sum_{e' <= e} ceil(n_e' / M) <= m}|`, -1 past the last, and `row[m]`, the tile's first row."""
    expert_E, tile_C = tl.arange(0, E2), tl.program_id(0) * C + tl.arange(0, C)
    end_E = tl.load(end_ptr + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(end_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    expert_C, row_C = tiles_of(tile_C, end_E - start_E, end_E, M, E, E2)
    tl.store(expert_ptr + tile_C, expert_C, mask=tile_C < num_tiles)
    tl.store(row_ptr + tile_C, row_C, mask=tile_C < num_tiles)


def sort_rows(top_k_index_TK: Tensor, num_experts: int, rows_of_tile: int = 0) -> SortedRows:
    """As `sorted_rows.sort_rows`, in two launches. rows_of_tile: of the tiles to map on the way, 0 for none."""
    num_pairs, num_k = top_k_index_TK.numel(), top_k_index_TK.shape[1]
    block = BLOCK * power_of_2(cdiv(num_pairs, BLOCK * MAX_BLOCKS))
    num_blocks, sizes = cdiv(num_pairs, block), {"E": num_experts, "E2": power_of_2(num_experts), "C": CHUNK}
    count_BE = top_k_index_TK.new_empty(num_blocks, num_experts, dtype=torch.int32)
    order = top_k_index_TK.new_empty(order_size(num_pairs, num_experts, rows_of_tile > 0), dtype=torch.int32)
    num_tiles = most_tiles(num_pairs, num_experts, rows_of_tile) if rows_of_tile else 0
    count_pairs[(num_blocks,)](top_k_index_TK, count_BE, num_pairs, block, **sizes)
    place_pairs[(num_blocks,)](
        top_k_index_TK, count_BE, order, num_pairs, block, num_blocks, num_tiles,
        K=num_k, M=rows_of_tile, **sizes, B=PREFIX_CHUNK, num_warps=8,
    )  # fmt: skip
    return SortedRows.of(order, num_pairs, num_experts, num_k)


def most_tiles(num_rows: int, num_experts: int, rows_of_tile: int) -> int:
    """Tiles that rows may need, however they are spread over the experts."""
    return num_rows // rows_of_tile + min(num_experts, num_rows)


def tiles_of_rows(rows: SortedRows, sorted_for: int, rows_of_tile: int) -> tuple[Tensor, Tensor]:
    """`tile_rows` of these rows, made when they were sorted if that was for tiles of the same size."""
    num_pairs, num_experts = rows.pair_P.shape[0], rows.end_E.shape[0]
    if sorted_for != rows_of_tile or rows.tiles.shape[0] == 0:
        return tile_rows(rows.end_E, num_pairs, rows_of_tile)
    num_tiles = most_tiles(num_pairs, num_experts, rows_of_tile)
    expert_M, row_M, _ = rows.tiles.split_with_sizes([num_tiles, num_tiles, rows.tiles.shape[0] - 2 * num_tiles])
    return expert_M, row_M


def tile_rows(end_E: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Expert and first row of each tile of at most `tile_rows` rows of one expert; expert -1 for tiles not needed."""
    num_experts = end_E.shape[0]
    num_tiles = most_tiles(num_rows, num_experts, tile_rows)
    expert_M, row_M = end_E.new_empty(2, num_tiles)
    sizes = {"E": num_experts, "E2": power_of_2(num_experts)}
    map_tiles[(cdiv(num_tiles, CHUNK),)](end_E, expert_M, row_M, num_tiles, **sizes, M=tile_rows, C=CHUNK)
    return expert_M, row_M
