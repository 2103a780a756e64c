"""Where token-expert pairs go: histogram, prefix sum and scatter, deterministic and without a host read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.sorted_rows import SortedRows

CHUNK = 64
"""Pairs compared with all experts at once."""

PREFIX_CHUNK = 32
"""Blocks summed at once."""

BLOCK = 1024
"""Pairs of one program."""


@triton.jit
def has_rows(end_ptr, expert):
    """Whether any row is an expert's."""
    return tl.load(end_ptr + expert) > tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)


@triton.jit
def count_pairs(index_ptr, count_ptr, num_pairs, E: tl.constexpr, E2: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """`count[b, e] = |{p in block b: index[p] = e}|`."""
    block, expert_E = tl.program_id(0), tl.arange(0, E2)
    total_E = tl.zeros((E2,), dtype=tl.int32)
    for start in range(0, tl.minimum(B, num_pairs - block * B), C):
        pair_C = block * B + start + tl.arange(0, C)
        index_C = tl.load(index_ptr + pair_C, mask=pair_C < num_pairs, other=-1).to(tl.int32)
        total_E += tl.sum((index_C[:, None] == expert_E[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + block * E + expert_E, total_E, mask=expert_E < E)


@triton.jit
def prefix_pairs(count_ptr, start_ptr, end_ptr, num_blocks, E: tl.constexpr, E2: tl.constexpr, C: tl.constexpr):
    """`end[e] = sum_{e' <= e} sum_b count[b, e']` and `start[b, e] = end[e - 1] + sum_{b' < b} count[b', e]`."""
    expert_E = tl.arange(0, E2)
    total_E = tl.zeros((E2,), dtype=tl.int32)
    for first in range(0, num_blocks, C):
        block_C = first + tl.arange(0, C)
        ok_CE = (block_C[:, None] < num_blocks) & (expert_E[None, :] < E)
        total_E += tl.sum(tl.load(count_ptr + block_C[:, None] * E + expert_E[None, :], mask=ok_CE, other=0), axis=0)
    end_E = tl.cumsum(total_E, axis=0)
    tl.store(end_ptr + expert_E, end_E, mask=expert_E < E)
    running_E = end_E - total_E
    for first in range(0, num_blocks, C):
        block_C = first + tl.arange(0, C)
        ok_CE = (block_C[:, None] < num_blocks) & (expert_E[None, :] < E)
        at_CE = block_C[:, None] * E + expert_E[None, :]
        count_CE = tl.load(count_ptr + at_CE, mask=ok_CE, other=0)
        start_CE = running_E[None, :] + tl.cumsum(count_CE, axis=0) - count_CE
        tl.store(start_ptr + at_CE, start_CE, mask=ok_CE)
        running_E += tl.sum(count_CE, axis=0)


@triton.jit
def place_pairs(
    index_ptr, start_ptr, pair_ptr, row_ptr, num_pairs,
    E: tl.constexpr, E2: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`row[p] = start[b, e] + |{p' < p in block b: index[p'] = e}|` with e = index[p], and `pair[row[p]] = p`."""
    block, expert_E = tl.program_id(0), tl.arange(0, E2)
    next_E = tl.load(start_ptr + block * E + expert_E, mask=expert_E < E, other=0)
    for start in range(0, tl.minimum(B, num_pairs - block * B), C):
        pair_C = block * B + start + tl.arange(0, C)
        index_C = tl.load(index_ptr + pair_C, mask=pair_C < num_pairs, other=-1).to(tl.int32)
        hit_CE = (index_C[:, None] == expert_E[None, :]).to(tl.int32)
        before_CE = next_E[None, :] + tl.cumsum(hit_CE, axis=0) - hit_CE
        row_C = tl.sum(hit_CE * before_CE, axis=1)
        tl.store(row_ptr + pair_C, row_C, mask=pair_C < num_pairs)
        tl.store(pair_ptr + row_C, pair_C, mask=pair_C < num_pairs)
        next_E += tl.sum(hit_CE, axis=0)


@triton.jit
def map_tiles(
    end_ptr, expert_ptr, row_ptr, num_tiles, E: tl.constexpr, E2: tl.constexpr, M: tl.constexpr, C: tl.constexpr
):
    """`expert[m] = |{e: sum_{e' <= e} ceil(n_e' / M) <= m}|`, -1 past the last, and `row[m]`, the tile's first row."""
    expert_E, tile_C = tl.arange(0, E2), tl.program_id(0) * C + tl.arange(0, C)
    end_E = tl.load(end_ptr + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(end_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    tiles_E = tl.where(expert_E < E, (end_E - start_E + M - 1) // M, 0)
    past_E = tl.cumsum(tiles_E, axis=0)
    expert_C = tl.sum(((past_E[None, :] <= tile_C[:, None]) & (expert_E[None, :] < E)).to(tl.int32), axis=1)
    own_CE = (expert_C[:, None] == expert_E[None, :]).to(tl.int32)
    first_C = tl.sum(own_CE * (past_E - tiles_E)[None, :], axis=1)
    row_C = tl.sum(own_CE * start_E[None, :], axis=1) + (tile_C - first_C) * M
    tl.store(expert_ptr + tile_C, tl.where(expert_C < E, expert_C, -1), mask=tile_C < num_tiles)
    tl.store(row_ptr + tile_C, row_C, mask=tile_C < num_tiles)


def sort_rows(top_k_index_TK: Tensor, num_experts: int) -> SortedRows:
    """As `sorted_rows.sort_rows`, in three launches."""
    index_P, num_k = top_k_index_TK.reshape(-1), top_k_index_TK.shape[1]
    num_pairs, sizes = index_P.numel(), {"E": num_experts, "E2": triton.next_power_of_2(num_experts)}
    num_blocks = triton.cdiv(num_pairs, BLOCK)
    count_BE, start_BE = index_P.new_empty(2, num_blocks, num_experts, dtype=torch.int32)
    pair_P, row_P, end_E = (index_P.new_empty(n, dtype=torch.int32) for n in (num_pairs, num_pairs, num_experts))
    count_pairs[(num_blocks,)](index_P, count_BE, num_pairs, **sizes, C=CHUNK, B=BLOCK)
    prefix_pairs[(1,)](count_BE, start_BE, end_E, num_blocks, **sizes, C=PREFIX_CHUNK, num_warps=8)
    place_pairs[(num_blocks,)](index_P, start_BE, pair_P, row_P, num_pairs, **sizes, C=CHUNK, B=BLOCK)
    return SortedRows(pair_P, row_P, end_E, num_k)


def tile_rows(end_E: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Expert and first row of each tile of at most `tile_rows` rows of one expert; expert -1 for tiles not needed."""
    num_experts = len(end_E)
    num_tiles = num_rows // tile_rows + min(num_experts, num_rows)
    expert_M, row_M = end_E.new_empty(2, num_tiles)
    sizes = {"E": num_experts, "E2": triton.next_power_of_2(num_experts)}
    map_tiles[(triton.cdiv(num_tiles, CHUNK),)](end_E, expert_M, row_M, num_tiles, **sizes, M=tile_rows, C=CHUNK)
    return expert_M, row_M


def tile_rows_reference(end_E: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    """What the used tiles of `tile_rows` hold, read to the host."""
    starts = [0, *end_E.tolist()]
    tiles = [
        (expert, row) for expert in range(len(end_E)) for row in range(starts[expert], starts[expert + 1], tile_rows)
    ]
    expert_M, row_M = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2).unbind(1)
    return expert_M, row_M
