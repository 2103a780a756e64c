"""One low-rank factor of an expert bank: compact while it trains, stock PEFT's layout in every state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune.adapters.delta import slots_of
from finetune.adapters.files import pack_a, pack_b, unpack_a, unpack_b


class Factor(nn.Module):
    """A or B of the trained experts of one projection.

    weight: A (X, R, in) or B (X, out, R), one slot per trained expert.
    slot_of_expert: (E,) int64, the slot of each expert, -1 for a frozen one.

    `state_dict` holds stock PEFT's A (E*R, in) or B (out, R*E), zero for frozen experts; `load_state_dict` takes
    that or the compact weight, and refuses a B that changes an expert outside the slots (AdapterError). Sharded
    weights (DTensor) and `state_dict(keep_vars=True)` stay compact.
    """

    slot_of_expert: Tensor

    def __init__(
        self, side: Literal["A", "B"], experts: Sequence[int], num_experts: int, rank: int, width: int
    ) -> None:
        super().__init__()
        self.side, self.experts, self.num_experts = side, tuple(experts), num_experts
        self.rank, self.width = rank, width
        shape = (rank, width) if side == "A" else (width, rank)
        self.weight = nn.Parameter(torch.zeros(len(self.experts), *shape))
        self.register_buffer("slot_of_expert", slots_of(self.experts, num_experts), persistent=False)

    def fill_uniform_(self, bound: float) -> None:
        """Draw the weight from U(-bound, bound) with torch's generator.

        Numbers are drawn for every expert, so that an expert starts the same whichever others train beside it.
        """
        every = self.weight.new_empty(self.num_experts, *self.weight.shape[1:], requires_grad=False)
        with torch.no_grad():
            self.weight.copy_(every.uniform_(-bound, bound)[list(self.experts)])

    @property
    def stock_shape(self) -> tuple[int, int]:
        """Shape in stock PEFT's layout."""
        tall = self.num_experts * self.rank
        return (tall, self.width) if self.side == "A" else (self.width, tall)

    def to_stock(self, weight: Tensor) -> Tensor:
        """A compact weight in stock PEFT's layout."""
        pack = pack_a if self.side == "A" else pack_b
        return pack(weight, self.experts, self.num_experts)

    def from_stock(self, stock: Tensor) -> Tensor:
        """The compact weight of a tensor in stock PEFT's layout."""
        unpack = unpack_a if self.side == "A" else unpack_b
        return unpack(stock, self.experts, self.num_experts, self.rank)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        compact = keep_vars or hasattr(weight, "device_mesh")
        destination[prefix + "weight"] = weight if compact else self.to_stock(weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + "weight"
        if key in state_dict and state_dict[key].ndim == 2:
            state_dict = {**state_dict, key: self.from_stock(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.side}, experts={len(self.experts)} of {self.num_experts}, rank={self.rank}, width={self.width}"
