"""Random documents in packed rows, and what a mask makes of them."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def random_lengths(seed: int) -> list[int]:
    """Tokens of each document of a block: one or many, of one token or more, now and then empty ones at the end."""
    rng = random.Random(seed)
    longest = rng.choice([1, 4, 40])
    lengths = [rng.choice([1, rng.randint(1, longest)]) for _ in range(rng.choice([1, 2, 12, 40]))]
    return lengths + [0] * rng.choice([0, 0, 3])


def ends_of(lengths: list[int]) -> Tensor:
    """Documents' ends, int32, with the 0 before the first."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def masked_attention(q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: list[int], scale: float) -> Tensor:
    """What `packed_attention` has to equal, by softmax over a whole row of scores."""
    groups = q_TQD.shape[1] // k_TKD.shape[1]
    k_TQD, v_TQD = (x.repeat_interleave(groups, 1) for x in (k_TKD, v_TKD))
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q_TQD.device)
    seen_TT = (document_T[:, None] == document_T) & torch.ones(
        len(q_TQD), len(q_TQD), device=q_TQD.device
    ).tril().bool()
    scores_QTT = torch.einsum("tqd,sqd->qts", q_TQD, k_TQD) * scale
    return torch.einsum("qts,sqd->tqd", scores_QTT.masked_fill(~seen_TT, -torch.inf).softmax(-1), v_TQD)
