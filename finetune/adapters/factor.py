"""One low-rank factor of an expert bank: compact while it trains, stock PEFT's layout in every state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune.adapters.delta import moved_slots, slots_of
from finetune.adapters.files import pack_a, pack_b, unpack_a, unpack_b
from finetune.errors import AdapterError, Problem


class Factor(nn.Module):
    """A or B of the trained experts of one projection.

    weight: A (X, R, in) or B (X, out, R), one slot per trained expert. With `ranks` of their own the rows of A (in) or
        the columns of B (out) of all slots, one below the other, (sum of ranks, in or out).
    slot_of_expert: (E,) int64, the slot of each expert, -1 for a frozen one.

    `state_dict` holds stock PEFT's A (E*R, in) or B (out, R*E), zero for frozen experts; `load_state_dict` takes
    that or the compact weight, and refuses a B that changes an expert outside the slots (AdapterError). Sharded
    weights (DTensor) and `state_dict(keep_vars=True)` stay compact.
    """

    slot_of_expert: Tensor
    _rows: Tensor

    def __init__(
        self,
        side: Literal["A", "B"],
        experts: Sequence[int],
        num_experts: int,
        rank: int,
        width: int,
        ranks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.side, self.experts, self.num_experts = side, tuple(experts), num_experts
        self.rank, self.width = rank, width
        self.ranks = None if ranks is None else tuple(ranks)
        shape = (rank, width) if side == "A" else (width, rank)
        if self.ranks is None:
            self.weight = nn.Parameter(torch.zeros(len(self.experts), *shape))
        else:
            assert max(self.ranks) <= rank, "rank is the largest of ranks"
            self.weight = nn.Parameter(torch.zeros(sum(self.ranks), width))
            rows = [slot * rank + row for slot, own in enumerate(self.ranks) for row in range(own)]
            self.register_buffer("_rows", torch.tensor(rows), persistent=False)
        self.register_buffer("slot_of_expert", slots_of(self.experts, num_experts), persistent=False)

    def fill_uniform_(self, bound: float) -> None:
        """Draw the weight from U(-bound, bound) with torch's generator.

        Numbers are drawn for every expert, so that an expert starts the same whichever others train beside it.
        """
        shape = (self.rank, self.width) if self.side == "A" else (self.width, self.rank)
        every = self.weight.new_empty(self.num_experts, *shape, requires_grad=False).uniform_(-bound, bound)
        with torch.no_grad():
            self.weight.copy_(self._compact(every[list(self.experts)]))

    @torch.no_grad()
    def move_(self, experts: Sequence[int], generator: torch.Generator) -> list[int]:
        """Give the slots to `experts`, as many as now, all of one rank.

        Returns the slot each of them had, -1 for none: its B starts at 0 and its A at random.
        """
        assert self.ranks is None
        source = [self.experts.index(expert) if expert in self.experts else -1 for expert in experts]
        moved = moved_slots(self.weight, source)
        if self.side == "A":
            for slot in (slot for slot, before in enumerate(source) if before < 0):
                start = torch.empty(self.rank, self.width).uniform_(-1, 1, generator=generator)
                moved[slot] = start.to(moved) / self.width**0.5
        self.weight.copy_(moved)
        self.slot_of_expert.copy_(slots_of(experts, self.num_experts))
        self.experts = tuple(experts)
        return source

    def slots(self) -> Tensor:
        """What the kernels take: A (X, R, in) or B (X, out, R), zero beyond the rank of an expert.

        There B and A are zero, so is the gradient of either by the other: nothing has to be masked.
        """
        return self._padded(self.weight)

    def _padded(self, weight: Tensor) -> Tensor:
        if self.ranks is None:
            return weight
        rows = weight.new_zeros(len(self.experts) * self.rank, self.width).index_copy(0, self._rows, weight)
        rows_XRW = rows.view(len(self.experts), self.rank, self.width)
        return rows_XRW if self.side == "A" else rows_XRW.mT.contiguous()

    def _compact(self, slots: Tensor) -> Tensor:
        if self.ranks is None:
            return slots
        rows_XRW = slots if self.side == "A" else slots.mT
        return rows_XRW.reshape(-1, self.width)[self._rows]

    @property
    def stock_shape(self) -> tuple[int, int]:
        """Shape in stock PEFT's layout."""
        tall = self.num_experts * self.rank
        return (tall, self.width) if self.side == "A" else (self.width, tall)

    def to_stock(self, weight: Tensor) -> Tensor:
        """A compact weight in stock PEFT's layout."""
        pack = pack_a if self.side == "A" else pack_b
        return pack(self._padded(weight), self.experts, self.num_experts)

    def from_stock(self, stock: Tensor) -> Tensor:
        """The compact weight of a tensor in stock PEFT's layout."""
        unpack = unpack_a if self.side == "A" else unpack_b
        slots = unpack(stock, self.experts, self.num_experts, self.rank)
        compact = self._compact(slots)
        if self.side == "B" and not torch.equal(self._padded(compact), slots):
            hint = "load the adapter with the expert plan it was saved with (finetune_adapter.json)"
            raise AdapterError(Problem("lora_B", "is not zero beyond the ranks of the expert plan", hint))
        return compact

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        compact = keep_vars or hasattr(weight, "device_mesh")
        destination[prefix + "weight"] = weight if compact else self.to_stock(weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + "weight"
        if key in state_dict and tuple(state_dict[key].shape) != tuple(self.weight.shape) and state_dict[key].ndim == 2:
            state_dict = {**state_dict, key: self.from_stock(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.side}, experts={len(self.experts)} of {self.num_experts}, rank={self.rank}, width={self.width}"
