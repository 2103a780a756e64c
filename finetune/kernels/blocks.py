"""Frozen banks with padding for their low-rank factors around them, so that one product computes both.

    W+ = [[ W , scale B ],
          [ A ,    0    ]]      per expert, (out + padding, in + padding)

`[x | z] [W | scale B]^T` is the projection with its factors, `[dy | dz] [[W], [A]]` its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.kernels.layer import Stack

RANK_MULTIPLE = 8
"""Ranks are rounded up to this: rows of 16-bit padding then start at multiples of 16 bytes."""

_PADDING = "_finetune_padding"


def rounded_rank(rank: int) -> int:
    """The rank as grouped products see it."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


@torch.no_grad()
def pad_bank_(bank_EOI: nn.Parameter, rank: int) -> None:
    """Move a frozen bank into block matrices with padding for factors up to `rank`; its values and shape stay.

    Takes the memory of a second copy of this bank while it runs. Moving the bank to another device or type loses the
    padding, and nothing else.
    """
    if padding_of(bank_EOI) >= rank:
        return
    (num_experts, height, width), padding = bank_EOI.shape, rounded_rank(rank)
    blocks = bank_EOI.new_zeros(num_experts, height + padding, width + padding)
    blocks[:, :height, :width] = bank_EOI
    bank_EOI.data = blocks[:, :height, :width]
    setattr(bank_EOI, _PADDING, padding)


def padding_of(bank_EOI: Stack) -> int:
    """The rank that fits around a bank, 0 for one that `pad_bank_` did not lay out."""
    if not isinstance(bank_EOI, Tensor):
        return 0
    padding: int = getattr(bank_EOI, _PADDING, 0)
    _, height, width = bank_EOI.shape
    in_place = bank_EOI.stride() == ((height + padding) * (width + padding), width + padding, 1)
    return padding if in_place else 0


def blocks_of(bank_EOI: Tensor, padding: int) -> Tensor:
    """The block matrices around a bank that has `padding`, (E, out + padding, in + padding), in the same memory.

    Writing to their padding does not count as a change of the bank, which autograd may have saved.
    """
    num_experts, height, width = bank_EOI.shape
    return bank_EOI.data.as_strided((num_experts, height + padding, width + padding), bank_EOI.stride())
