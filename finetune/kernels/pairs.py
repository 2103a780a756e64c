"""Token-expert pairs in rows ordered by expert, cut into blocks that are computed one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (1, 2, 4, 8)
ROW_MULTIPLE = 16
CALL_ROWS = 512


@dataclass(frozen=True)
class Block:
    """Consecutive rows that belong to the experts of one or several segments.

    start: first row in the whole row buffer.
    experts: expert of each segment.
    sizes: rows of each segment, so that `sum(sizes)` is the number of rows.
    """

    start: int
    experts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + sum(self.sizes)


@dataclass(frozen=True)
class PairRows:
    """Where each pair p = t * K + k lies in a row buffer of N >= P rows.

    pair_N: pair that a row holds, int64; P for a padding row.
    row_P: row of each pair, int64.
    """

    blocks: tuple[Block, ...]
    pair_N: Tensor
    row_P: Tensor


def sort_pairs(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Pairs in the order of their experts (stable) and the number of pairs of each expert, read to the host."""
    expert_P = top_k_index_TK.reshape(-1)
    return torch.sort(expert_P, stable=True).indices, torch.bincount(expert_P, minlength=num_experts).tolist()


def dense_rows(order_P: Tensor, counts: Sequence[int], max_rows: int) -> PairRows:
    """Rows without padding, in blocks of whole experts of at most `max_rows` rows; a busier expert is a block alone."""
    blocks: list[Block] = []
    experts: list[int] = []
    start = rows = 0
    for expert, count in enumerate(counts):
        if experts and count and rows + count > max_rows:
            blocks.append(Block(start, tuple(experts), tuple(counts[e] for e in experts)))
            start, rows, experts = start + rows, 0, []
        if count:
            experts.append(expert)
            rows += count
    if experts:
        blocks.append(Block(start, tuple(experts), tuple(counts[e] for e in experts)))
    row_P = torch.empty_like(order_P)
    row_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    return PairRows(tuple(blocks), order_P, row_P)


def padded_rows(order_P: Tensor, counts: Sequence[int]) -> PairRows:
    """Experts of like load share a block, padded to its busiest.

    Blocks have one of few sizes and segments are multiples of ROW_MULTIPLE rows, because CPU libraries compile a
    product for each new shape, which takes longer than a small product itself. The number of blocks is the one with
    the least rows, a block counting like CALL_ROWS of them.
    """
    by_load = sorted(range(len(counts)), key=lambda expert: -counts[expert])
    blocks = min((_blocks_of_like_load(by_load, counts, groups) for groups in GROUPS), key=_cost)
    start_of, size_of = [0] * len(counts), [0] * len(counts)
    for block in blocks:
        for i, (expert, size) in enumerate(zip(block.experts, block.sizes, strict=True)):
            start_of[expert], size_of[expert] = block.start + i * size, size
    device, num_pairs = order_P.device, order_P.numel()
    count_E, start_E = torch.tensor(list(counts), device=device), torch.tensor(start_of, device=device)
    shift_E = start_E - (count_E.cumsum(0) - count_E)
    row_of_place_P = torch.arange(num_pairs, device=device)
    row_of_place_P += torch.repeat_interleave(shift_E, count_E, output_size=num_pairs)
    pair_N = order_P.new_full((sum(size_of),), num_pairs)
    pair_N[row_of_place_P] = order_P
    row_P = torch.empty_like(order_P)
    row_P[order_P] = row_of_place_P
    return PairRows(tuple(blocks), pair_N, row_P)


def _blocks_of_like_load(by_load: Sequence[int], counts: Sequence[int], groups: int) -> list[Block]:
    blocks, start, width = [], 0, -(-len(by_load) // groups)
    for first in range(0, len(by_load), width):
        experts = by_load[first : first + width]
        size = -(-counts[experts[0]] // ROW_MULTIPLE) * ROW_MULTIPLE
        if size:
            blocks.append(Block(start, tuple(sorted(experts)), (size,) * len(experts)))
            start = blocks[-1].stop
    return blocks


def _cost(blocks: Sequence[Block]) -> int:
    return blocks[-1].stop + CALL_ROWS * len(blocks)
