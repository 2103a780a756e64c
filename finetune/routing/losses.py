"""Auxiliary losses of one layer's router, as sums over some of a batch's tokens.

Each is a mean over the tokens of a whole batch. The functions give the part of it that some tokens contribute, so that
parts computed apart, in micro-batches or on several devices, add up to the loss and to its gradient.

Tensor shapes: T tokens, E experts. N is the number of tokens of the whole batch that count; `counts_T` is 1 where a
token does and 0 where not, None where all do. Tokens are weighed and never picked, which would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
