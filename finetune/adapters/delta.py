"""The change of whole experts: compact while it trains, and compact on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Delta(nn.Module):
    """What training adds to one projection of the trained experts, as ESFT trains them (arXiv 2407.01906).

    weight: (X, out, in), zero at first, one slot per trained expert.
    slot_of_expert: (E,) int64, the slot of each expert, -1 for a frozen one.
    """

    slot_of_expert: Tensor

    def __init__(self, experts: Sequence[int], num_experts: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.experts, self.num_experts = tuple(experts), num_experts
        self.weight = nn.Parameter(torch.zeros(len(self.experts), *shape))
        self.register_buffer("slot_of_expert", slots_of(self.experts, num_experts), persistent=False)

    @torch.no_grad()
    def move_(self, experts: Sequence[int], generator: torch.Generator) -> list[int]:
        """Give the slots to `experts`, as many as now.

        Returns the slot each of them had, -1 for none: its change starts at 0.
        """
        source = [self.experts.index(expert) if expert in self.experts else -1 for expert in experts]
        self.weight.copy_(moved_slots(self.weight, source))
        self.slot_of_expert.copy_(slots_of(experts, self.num_experts))
        self.experts = tuple(experts)
        return source

    @property
    def stock_shape(self) -> tuple[int, ...]:
        """Shape on disk; no layout of stock PEFT can say it, so it is the compact one."""
        return tuple(self.weight.shape)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"experts={len(self.experts)} of {self.num_experts}, shape={tuple(self.weight.shape[1:])}"


def moved_slots(values: Tensor, source: Sequence[int]) -> Tensor:
    """The slots `source` of `values`, zero for -1."""
    index = torch.tensor(source, device=values.device)
    return values[index.clamp(min=0)] * (index >= 0).view(-1, *[1] * (values.ndim - 1)).to(values.dtype)


def slots_of(experts: Sequence[int], num_experts: int) -> Tensor:
    """The slot of each expert (E,) when `experts` have one each in their order; -1 for the others."""
    slot_of_expert = torch.full((num_experts,), -1, dtype=torch.long)
    slot_of_expert[list(experts)] = torch.arange(len(experts))
    return slot_of_expert
