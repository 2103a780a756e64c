"""Auxiliary losses of one layer's router, as sums over some of a batch's tokens.

Each is a mean over the tokens of a whole batch. The functions give the part of it that some tokens contribute, so that
parts computed apart, in micro-batches or on several devices, add up to the loss and to its gradient.

`by_tiles` takes them some tokens at a time: of a long block no copy of a layer's logits in 32 bit is ever whole.

Tensor shapes: T tokens, E experts, K experts per token. N is the number of tokens of the whole batch that count;
`counts_T` is 1 where a token does and 0 where not, None where all do. Tokens are weighed and never picked, which would
wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TILE_TOKENS = 16_384
"""Tokens whose probabilities exist at a time: 8 MiB for 128 experts in float32."""


def balance_loss(
    logits_TE: Tensor, tokens_E: Tensor, num_tokens: float | Tensor, counts_T: Tensor | None = None
) -> Tensor:
    """Load balance: E sum_e f_e P_e, where f_e counts an expert's tokens in N and P_e is its mean probability.

    tokens_E: tokens that each expert gets in the whole batch; no gradient flows through them. With even routing the
    loss is K. Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6, for K experts per token.
    """
    load_E = tokens_E.to(torch.float32) / num_tokens
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    sums_E = (probabilities_TE if counts_T is None else probabilities_TE * counts_T[:, None]).sum(0)
    return len(load_E) * (load_E * sums_E).sum() / num_tokens


def z_loss(logits_TE: Tensor, num_tokens: float | Tensor, counts_T: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the logits, which keeps them small. Source: ST-MoE (arXiv 2202.08906), equation 5."""
    squared_T = torch.logsumexp(logits_TE.float(), dim=-1).square()
    return (squared_T if counts_T is None else squared_T * counts_T).sum() / num_tokens


def kl_to_base(
    logits_TE: Tensor, base_logits_TE: Tensor, num_tokens: float | Tensor, counts_T: Tensor | None = None
) -> Tensor:
    """Mean KL(base || now) of the probabilities of all experts."""
    now, base = (torch.log_softmax(logits.float(), dim=-1) for logits in (logits_TE, base_logits_TE))
    terms_TE = base.exp() * (base - now)
    return (terms_TE if counts_T is None else terms_TE * counts_T[:, None]).sum() / num_tokens


def tokens_of_experts(logits_TE: Tensor, top_k: int, counts_T: Tensor | None = None) -> Tensor:
    """How many tokens choose each expert, (E,), whole numbers."""
    tokens_E = torch.zeros(logits_TE.shape[1], dtype=torch.long, device=logits_TE.device)
    for logits_tE, counts_t in _tiles(logits_TE.detach(), counts_T):
        index_tK = logits_tE.float().softmax(-1).topk(top_k).indices
        ones_tK = torch.ones_like(index_tK) if counts_t is None else counts_t[:, None].expand_as(index_tK)
        tokens_E.index_add_(0, index_tK.reshape(-1), ones_tK.reshape(-1))
    return tokens_E


def by_tiles(loss: Callable[..., Tensor], logits_TE: Tensor, *others: Tensor | None) -> Tensor:
    """`loss(logits_TE, *others)`, a sum over tokens, which some tokens at a time add up to.

    others: have a row for each token and get no gradient, or are None.

    Backward computes each tile again. Beside the logits it writes their gradient, in their type, and keeps nothing.
    """
    found: Tensor = _ByTiles.apply(loss, logits_TE, *others)
    return found


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], logits_TE: Tensor, *others: Tensor | None) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(logits_TE, *others)
        return torch.stack([loss(*tile) for tile in _tiles(logits_TE, *others)]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.saved_tensors
        d_logits_TE = torch.empty_like(rows[0])
        for d_logits_tE, logits_tE, *others in _tiles(d_logits_TE, *rows):
            with torch.enable_grad():
                leaf_tE = logits_tE.detach().requires_grad_()
                d_logits_tE.copy_(torch.autograd.grad(ctx.loss(leaf_tE, *others), leaf_tE, grad)[0])
        return None, d_logits_TE, *[None] * (len(rows) - 1)


def _tiles(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same rows of each, TILE_TOKENS at a time."""
    for start in range(0, len(first), TILE_TOKENS):
        t = slice(start, start + TILE_TOKENS)
        yield first[t], *[None if other is None else other[t] for other in others]
