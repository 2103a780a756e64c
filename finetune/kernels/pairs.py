"""Token-expert pairs in rows ordered by expert, cut into blocks that are computed one after another.

On CPU, 16-bit products are compiled for each new shape, which takes longer than a small product itself. Where that is
so, experts are padded to few different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (1, 2, 4, 8)
BATCH_MULTIPLE = 16
CALL_ROWS = 512


@dataclass(frozen=True)
class Block:
    """Consecutive rows that belong to the experts of one or several segments.

    start: first row in the whole row buffer.
    experts: expert of each segment.
    sizes: rows of each segment, padding included.
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
    """Where each pair p = t * K + k lies in a buffer of N >= P rows.

    pair_N: pair that a row holds, int64; P for a padding row.
    row_P: row of each pair, int64.
    """

    blocks: tuple[Block, ...]
    pair_N: Tensor
    row_P: Tensor

    @property
    def has_padding(self) -> bool:
        """Whether some rows hold no pair."""
        return len(self.pair_N) > len(self.row_P)


def sort_pairs(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Pairs in the order of their experts (stable) and the number of pairs of each expert, read to the host."""
    expert_P = top_k_index_TK.reshape(-1)
    return torch.sort(expert_P, stable=True).indices, torch.bincount(expert_P, minlength=num_experts).tolist()


def slice_blocks(counts: Sequence[int], max_rows: int, *, few_sizes: bool) -> list[Block]:
    """Blocks of whole experts of about `max_rows` rows; a busier expert is a block alone.

    few_sizes: round the rows of an expert up, by 3 % on average where experts have a hundred rows.
    """
    blocks: list[Block] = []
    pending: dict[int, int] = {}
    start = rows = 0
    for expert, count in enumerate(counts):
        size = _rounded(count) if few_sizes else count
        if pending and size and rows + size > max_rows:
            blocks.append(Block(start, tuple(pending), tuple(pending.values())))
            start, rows, pending = start + rows, 0, {}
        if size:
            pending[expert] = size
            rows += size
    if pending:
        blocks.append(Block(start, tuple(pending), tuple(pending.values())))
    return blocks


def _rounded(count: int) -> int:
    multiple = 1 if count <= 8 else 8 if count <= 256 else 32 if count <= 1024 else 128
    return -(-count // multiple) * multiple


def batch_blocks(counts: Sequence[int]) -> list[Block]:
    """Blocks of experts of like load, all padded to the busiest of their block.

    How many blocks is what gives the least rows, a block counting like CALL_ROWS of them; they have one of few
    numbers of experts.
    """
    by_load = sorted(range(len(counts)), key=lambda expert: -counts[expert])
    return min((_blocks_of_like_load(by_load, counts, groups) for groups in GROUPS), key=_cost)


def _blocks_of_like_load(by_load: Sequence[int], counts: Sequence[int], groups: int) -> list[Block]:
    blocks, start, width = [], 0, -(-len(by_load) // groups)
    for first in range(0, len(by_load), width):
        experts = by_load[first : first + width]
        size = -(-counts[experts[0]] // BATCH_MULTIPLE) * BATCH_MULTIPLE
        if size:
            blocks.append(Block(start, tuple(sorted(experts)), (size,) * len(experts)))
            start = blocks[-1].stop
    return blocks


def _cost(blocks: Sequence[Block]) -> int:
    return (blocks[-1].stop if blocks else 0) + CALL_ROWS * len(blocks)


def lay_out(order_P: Tensor, counts: Sequence[int], blocks: Sequence[Block]) -> PairRows:
    """Sorted pairs in the rows of `blocks`; every expert's pairs come first in its segment, padding after."""
    starts = [0] * len(counts)
    for block in blocks:
        start = block.start
        for expert, size in zip(block.experts, block.sizes, strict=True):
            starts[expert] = start
            start += size
    device, num_pairs = order_P.device, order_P.numel()
    count_E, start_E = torch.tensor(list(counts), device=device), torch.tensor(starts, device=device)
    shift_E = start_E - (count_E.cumsum(0) - count_E)
    row_of_sorted_P = torch.arange(num_pairs, device=device)
    row_of_sorted_P += torch.repeat_interleave(shift_E, count_E, output_size=num_pairs)
    pair_N = order_P.new_full((blocks[-1].stop if blocks else 0,), num_pairs)
    pair_N[row_of_sorted_P] = order_P
    row_P = torch.empty_like(order_P)
    row_P[order_P] = row_of_sorted_P
    return PairRows(tuple(blocks), pair_N, row_P)
