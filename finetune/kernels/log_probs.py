"""Log-probabilities of next tokens under a frozen head, without the (N, V) logits; the loss of training.

One tile of logits lives at a time, in the type it is multiplied in, and the head is multiplied twice: the gradient with
respect to a token's hidden state is known as soon as its logits are, up to a factor that backward brings.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.kernels.support import triton_fault

Backend = Literal["auto", "torch", "triton"]

CPU_TILE_TOKENS = 256
"""Fewer read the head too often, more take memory: 0.2 GiB at Qwen3's vocabulary."""
TILE_BYTES = 320 * 2**20
"""Of a tile on a device: 1,024 tokens at Qwen3's vocabulary, for which the head is worth reading."""
TILE_ROWS = 128
"""What products on a device take at a time."""
MAX_TILE_TOKENS = 8192


def log_probs(
    hidden_NH: Tensor,
    head_VH: Tensor,
    target_N: Tensor,
    *,
    tile_tokens: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (N,), in float32 or better, and whether it is the most likely token (N,).

    hidden_NH: what the head reads, in the head's dtype.
    head_VH: frozen; no gradient is computed for it.
    target_N: token ids.
    tile_tokens: rows of logits at a time; `tile_tokens_for` when None.
    backend: what turns logits into probabilities; auto: the Triton kernel on a CUDA device that runs it, which needs
        no float32 copy of the tile.

    Reads nothing back to the host.
    """
    assert not head_VH.requires_grad, "the head is trained"
    if backend == "auto":
        backend = "triton" if runs_triton(hidden_NH.device, hidden_NH.dtype) else "torch"
    if tile_tokens is None:
        tile_tokens = tile_tokens_for(len(target_N), len(head_VH), hidden_NH.dtype, hidden_NH.device)
    logp_N, right_N = _LogProbs.apply(hidden_NH, head_VH, target_N, tile_tokens, backend)
    return logp_N, right_N


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `auto` means the Triton kernel."""
    return device.type == "cuda" and dtype != torch.float64 and triton_fault(device) is None


def tile_tokens_for(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a tile: as many as fit TILE_BYTES, all tiles alike, so that no product is left with a few rows."""
    if device.type == "cpu":
        return CPU_TILE_TOKENS
    most = TILE_BYTES // (vocabulary * dtype.itemsize) // TILE_ROWS * TILE_ROWS
    most = min(max(most, TILE_ROWS), MAX_TILE_TOKENS)
    tiles = max(math.ceil(tokens / most), 1)
    return min(math.ceil(tokens / tiles / TILE_ROWS) * TILE_ROWS, most) or TILE_ROWS


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, tile_tokens: int, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logp_N = hidden_NH.new_empty(target_N.shape, dtype=dtype)
        right_N = torch.empty_like(target_N, dtype=torch.bool)
        d_hidden_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        logits_nV = hidden_NH.new_empty(min(tile_tokens, len(target_N)), len(head_VH))
        for start in range(0, len(target_N), tile_tokens):
            n = slice(start, start + tile_tokens)
            tile_nV = logits_nV[: len(target_N[n])]
            torch.mm(hidden_NH[n], head_VH.t(), out=tile_nV)
            _score_rows_(tile_nV, target_N[n], logp_N[n], right_N[n], d_hidden_NH is not None, backend)
            if d_hidden_NH is not None:
                torch.mm(tile_nV, head_VH, out=d_hidden_NH[n])
        ctx.save_for_backward(d_hidden_NH)
        ctx.mark_non_differentiable(right_N)
        return logp_N, right_N

    @staticmethod
    def backward(ctx: Any, d_logp_N: Tensor, d_right_N: None) -> tuple[Tensor, None, None, None, None]:
        (d_hidden_NH,) = ctx.saved_tensors
        return (d_logp_N.unsqueeze(1) * d_hidden_NH).to(d_hidden_NH.dtype), None, None, None, None


def _score_rows_(
    logits_nV: Tensor, target_n: Tensor, logp_n: Tensor, right_n: Tensor, gradient: bool, backend: Backend
) -> None:
    """Fills logp_n and right_n, and turns the logits into d logp / d logits: one at the target less p."""
    if backend == "triton":
        from finetune.kernels.triton.log_probs import score_rows_

        score_rows_(logits_nV, target_n, logp_n, right_n.view(torch.uint8), gradient=gradient)
        return
    target_n1 = target_n.unsqueeze(1)
    p_nV = logits_nV.to(logp_n.dtype, copy=True)
    logit_n1 = p_nV.gather(1, target_n1)
    top = p_nV.max(1, keepdim=True)
    torch.eq(top.indices.squeeze(1), target_n, out=right_n)
    sum_n1 = p_nV.sub_(top.values).exp_().sum(1, keepdim=True)
    torch.sub(logit_n1 - top.values, sum_n1.log(), out=logp_n.unsqueeze(1))
    if gradient:
        p_nV.div_(-sum_n1).scatter_add_(1, target_n1, p_nV.new_ones(target_n1.shape))
        logits_nV.copy_(p_nV)
