"""Token-expert pairs in rows ordered by expert, cut into blocks of experts that are computed together.

The experts of a block have equally many rows, so that one batched product serves all of them; experts of like load
share a block, so that this pads few rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive rows of some experts, `size` rows of each.

    start: first row in the whole row buffer.
    used: of each expert's rows, how many the product with its frozen weight is computed for.
    """

    start: int
    experts: tuple[int, ...]
    size: int
    used: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.experts) * self.size

    @property
    def parts(self) -> list[int]:
        """Rows used and rows left over of each expert in turn."""
        return [rows for used in self.used for rows in (used, self.size - used)]

    def batched(self, rows: Tensor) -> Tensor:
        """The block's (N, ...) rows as (experts, size, ...)."""
        return rows.view(len(self.experts), self.size, *rows.shape[1:])


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


ROUNDING_STEPS = (8, 64, 256, 1024)


class Rounding(NamedTuple):
    """What numbers of rows are multiples of, for up to 8, 64, 256, 1024 pairs of an expert, and for more."""

    size: tuple[int, ...]
    used: tuple[int, ...]


EXACT = Rounding((1, 1, 1, 1, 1), (1, 1, 1, 1, 1))
ALIGNED = Rounding((1, 8, 8, 8, 8), (1, 1, 1, 1, 1))
"""Batched float32 products of 153 rows take longer than of 160."""

FEW_SIZES = Rounding((1, 8, 16, 64, 256), (1, 4, 8, 16, 32))
"""On CPU, 16-bit products are compiled for each new shape, which takes longer than a small product itself; there are
more products with a block's size in them than with one expert's rows."""


@dataclass(frozen=True)
class BlockCosts:
    """What decides how experts are put together.

    max_rows: of a block, unless it is one expert.
    block_rows: rows whose computation takes as long as starting a block.
    rounding: how numbers of rows are rounded up.
    """

    max_rows: int
    block_rows: int
    rounding: Rounding

    def size(self, count: int) -> int:
        """Rows to set aside for an expert that has `count` pairs."""
        return _round_up(count, self.rounding.size)

    def used(self, count: int) -> int:
        """Rows to multiply by the frozen weights, which takes most of the time: at most `size`."""
        return _round_up(count, self.rounding.used)


def _round_up(count: int, multiples: Sequence[int]) -> int:
    multiple = multiples[bisect_left(ROUNDING_STEPS, count)]
    return -(-count // multiple) * multiple


def plan_blocks(counts: Sequence[int], kinds: Sequence[Hashable], costs: BlockCosts) -> list[Block]:
    """Blocks of the experts that have pairs, each of one kind, at the least cost of rows and blocks together.

    kinds: of every expert; only experts of one kind are put together.
    """
    by_kind: dict[Hashable, list[int]] = {}
    for expert in sorted(range(len(counts)), key=lambda expert: -counts[expert]):
        if counts[expert]:
            by_kind.setdefault(kinds[expert], []).append(expert)
    blocks: list[Block] = []
    for experts in by_kind.values():
        sizes = [costs.size(counts[expert]) for expert in experts]
        for first, width in _widths(sizes, costs):
            start = blocks[-1].stop if blocks else 0
            members = tuple(sorted(experts[first : first + width]))
            used = tuple(costs.used(counts[expert]) for expert in members)
            blocks.append(Block(start, members, sizes[first], used))
    return blocks


def _widths(sizes: Sequence[int], costs: BlockCosts) -> list[tuple[int, int]]:
    """First expert and number of experts of each block; numbers are powers of two, so that shapes recur.

    sizes: falling. Dynamic programming from the end, in O(experts x log experts): the widest block that fits is not the
    cheapest, since it pads all of its experts to the rows of the largest.
    """
    least, best = [0] * (len(sizes) + 1), [1] * len(sizes)
    for first in range(len(sizes) - 1, -1, -1):
        size, width = sizes[first], 1
        least[first] = size + costs.block_rows + least[first + 1]
        while first + 2 * width <= len(sizes) and 2 * width * size <= costs.max_rows:
            width *= 2
            cost = width * size + costs.block_rows + least[first + width]
            if cost <= least[first]:
                least[first], best[first] = cost, width
    found, first = [], 0
    while first < len(sizes):
        found.append((first, best[first]))
        first += best[first]
    return found


def lay_out(order_P: Tensor, counts: Sequence[int], blocks: Sequence[Block]) -> PairRows:
    """Sorted pairs in the rows of `blocks`; every expert's pairs come first in its rows, padding after."""
    starts = [0] * len(counts)
    for block in blocks:
        for i, expert in enumerate(block.experts):
            starts[expert] = block.start + i * block.size
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
