"""Token-expert pairs in rows ordered by expert, laid out on the device: nothing is read to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedRows:
    """Where each pair p = t * K + k lies in P rows ordered by expert, pairs of one expert in their own order.

    pair_P: pair of each row, int32.
    row_P: row of each pair, int32.
    end_E: one past the last row of each expert, int32.
    num_k: K.
    """

    pair_P: Tensor
    row_P: Tensor
    end_E: Tensor
    num_k: int

    @property
    def token_P(self) -> Tensor:
        """Token of each row, int32."""
        return self.pair_P // self.num_k

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What to save for backward."""
        return self.pair_P, self.row_P, self.end_E


def sort_rows(top_k_index_TK: Tensor, num_experts: int) -> SortedRows:
    """The rows of a call, by a stable sort; deterministic."""
    expert_P, order_P = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    experts_E = torch.arange(num_experts, device=expert_P.device)
    end_E = torch.searchsorted(expert_P, experts_E, right=True).int()
    row_P = torch.empty_like(order_P, dtype=torch.int32)
    row_P.scatter_(0, order_P, torch.arange(len(order_P), dtype=torch.int32, device=order_P.device))
    return SortedRows(order_P.int(), row_P, end_E, top_k_index_TK.shape[1])
