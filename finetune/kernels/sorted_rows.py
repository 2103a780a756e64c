"""Token-expert pairs in rows ordered by expert, laid out on the device: nothing is read to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TILE_ROWS = 16
"""The fewest rows a tile may have."""


@dataclass(frozen=True)
class SortedRows:
    """Where each pair p = t * K + k lies in P rows ordered by expert, pairs of one expert in their own order.

    order: all of it in one int32 tensor, to be saved for backward; the others are parts of it.
    pair_P: pair of each row.
    row_P: row of each pair.
    token_P: token of each row.
    end_E: one past the last row of each expert.
    tiles: as many values as two lists of tiles may take, see `triton.routing`; empty where there are none.
    num_k: K.
    """

    order: Tensor
    pair_P: Tensor
    row_P: Tensor
    token_P: Tensor
    end_E: Tensor
    tiles: Tensor
    num_k: int

    @classmethod
    def of(cls, order: Tensor, num_pairs: int, num_experts: int, num_k: int) -> SortedRows:
        """The rows that `order` describes."""
        rest = order.shape[0] - 3 * num_pairs - num_experts
        sizes = [num_pairs, num_pairs, num_pairs, num_experts, rest]
        pair_P, row_P, token_P, end_E, tiles = order.split_with_sizes(sizes)
        return cls(order, pair_P, row_P, token_P, end_E, tiles, num_k)


def order_size(num_pairs: int, num_experts: int, tiled: bool) -> int:
    """Values of `SortedRows.order`. tiled: with space for tiles of MIN_TILE_ROWS or more."""
    return 3 * num_pairs + num_experts + (2 * (num_pairs // MIN_TILE_ROWS + num_experts) if tiled else 0)


def sort_rows(top_k_index_TK: Tensor, num_experts: int) -> SortedRows:
    """The rows of a call, by a stable sort; deterministic."""
    num_pairs, num_k, device = top_k_index_TK.numel(), top_k_index_TK.shape[1], top_k_index_TK.device
    order = torch.empty(order_size(num_pairs, num_experts, False), dtype=torch.int32, device=device)
    rows = SortedRows.of(order, num_pairs, num_experts, num_k)
    expert_P, order_P = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    experts_E = torch.arange(num_experts, device=device)
    torch.searchsorted(expert_P, experts_E, right=True, out_int32=True, out=rows.end_E)
    rows.pair_P.copy_(order_P)
    rows.row_P.scatter_(0, order_P, torch.arange(num_pairs, dtype=torch.int32, device=device))
    torch.div(rows.pair_P, num_k, rounding_mode="floor", out=rows.token_P)
    return rows
