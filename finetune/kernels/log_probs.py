"""Log-probabilities of next tokens under a frozen head, without the (N, V) logits; the loss of training on a CPU.

TRL's own function keeps eight float32 copies of a tile of logits on a CPU and multiplies by the head three times.
Here one tile lives at a time and the head is multiplied twice: the gradient with respect to a token's hidden state
is known as soon as its logits are, up to a factor that backward brings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TILE_TOKENS = 256
"""Fewer read the head too often, more take memory: 0.2 GiB at Qwen3's vocabulary."""


def log_probs(
    hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, *, tile_tokens: int = TILE_TOKENS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (N,), in float32 or better, and whether it is the most likely token (N,).

    hidden_NH: what the head reads, in the head's dtype.
    head_VH: frozen; no gradient is computed for it.
    target_N: token ids.
    """
    assert not head_VH.requires_grad, "the head is trained"
    logp_N, right_N = _LogProbs.apply(hidden_NH, head_VH, target_N, tile_tokens)
    return logp_N, right_N


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, tile_tokens: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logp_N = hidden_NH.new_empty(target_N.shape, dtype=dtype)
        right_N = torch.empty_like(target_N, dtype=torch.bool)
        d_hidden_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(target_N), tile_tokens):
            n = slice(start, start + tile_tokens)
            target_n1 = target_N[n].unsqueeze(1)
            tile_nV = torch.mm(hidden_NH[n], head_VH.t())
            p_nV = tile_nV.to(dtype, copy=True)
            logit_n1 = p_nV.gather(1, target_n1)
            top = p_nV.max(1, keepdim=True)
            right_N[n] = (top.indices == target_n1).squeeze(1)
            sum_n1 = p_nV.sub_(top.values).exp_().sum(1, keepdim=True)
            logp_N[n] = (logit_n1 - top.values - sum_n1.log()).squeeze(1)
            if d_hidden_NH is not None:  # d log p / d logits is one at the target less p
                minus_d_nV = p_nV.div_(sum_n1).scatter_add_(1, target_n1, p_nV.new_full(target_n1.shape, -1.0))
                torch.mm(tile_nV.copy_(minus_d_nV), head_VH, out=d_hidden_NH[n]).neg_()
        ctx.save_for_backward(d_hidden_NH)
        ctx.mark_non_differentiable(right_N)
        return logp_N, right_N

    @staticmethod
    def backward(ctx: Any, d_logp_N: Tensor, d_right_N: None) -> tuple[Tensor, None, None, None]:
        (d_hidden_NH,) = ctx.saved_tensors
        return (d_logp_N.unsqueeze(1) * d_hidden_NH).to(d_hidden_NH.dtype), None, None, None
