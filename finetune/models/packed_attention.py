"""Causal attention within the documents of packed rows: no mask, and a cost of the sum of their squares.

`finetune::packed_attention` is one opaque operator with a derivative, for compilers, and for checkpointing that keeps
its outputs. On CUDA it is torch's FlashAttention for variable lengths, what `torch.nn.attention.varlen` calls too; on a
CPU torch's own kernel, documents of like length together.

Tensor shapes: T tokens of all documents, N documents of a group, L tokens of the longest of them; Q heads of queries,
K of keys and values, G heads of queries for each of those; D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

aten = torch.ops.aten

CALL_FLOPS = 5e5
"""Products that take a CPU as long as calling its kernel once more: padding up to this is the cheaper way."""


@torch.library.custom_op("finetune::packed_attention", mutates_args=())
def packed_attention(
    q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, ends: Tensor, longest: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each token to those of its document up to itself (T, Q, D), and log-sum-exps of scores (Q, T).

    ends: where documents end and the next begin, int32: 0 first, T last; empty documents are allowed.
    longest: tokens of the longest document or more, (1,) on the CPU wherever the others are: a compiler would make a
        constant of an integer.
    """
    if q_TQD.is_cuda:
        most = int(longest)
        found = aten._flash_attention_forward(
            q_TQD, k_TKD, v_TKD, ends, ends, most, most, 0.0, True, False, scale=scale
        )
        return found[0], found[1]
    out_TQD, lse_QT = torch.empty_like(q_TQD), _lse_like(q_TQD)
    for group in _groups_of(ends, q_TQD):
        q, k, v = group.heads(q_TQD, k_TKD, v_TKD)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        group.put_(out_TQD, out)
        group.put_(lse_QT.t()[..., None], lse[..., None])
    return out_TQD, lse_QT


@packed_attention.register_fake
def _(
    q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, ends: Tensor, longest: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_TQD), _lse_like(q_TQD)


def _lse_like(q_TQD: Tensor) -> Tensor:
    dtype = torch.float64 if q_TQD.dtype == torch.float64 else torch.float32
    return q_TQD.new_empty(q_TQD.shape[1], q_TQD.shape[0], dtype=dtype)


@torch.library.custom_op("finetune::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_TQD: Tensor,
    q_TQD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_TQD: Tensor,
    lse_QT: Tensor,
    ends: Tensor,
    longest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    if q_TQD.is_cuda:
        most, no_dropout = int(longest), torch.zeros(2, dtype=torch.uint64, device=q_TQD.device)
        saved = q_TQD, k_TKD, v_TKD, out_TQD, lse_QT, ends, ends, most, most, 0.0, True
        found = aten._flash_attention_backward(
            grad_TQD.contiguous(), *saved, no_dropout, q_TQD.new_empty(0), scale=scale
        )
        return found[0], found[1], found[2]
    grads = torch.empty_like(q_TQD), torch.empty_like(k_TKD), torch.empty_like(v_TKD)
    for group in _groups_of(ends, q_TQD):
        q, k, v = group.heads(q_TQD, k_TKD, v_TKD)
        grad, out, lse = (group.take(x, k_TKD.shape[1]) for x in (grad_TQD, out_TQD, lse_QT.t()[..., None]))
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            group.without_padding(grad), q, k, v, out, lse[..., 0], 0.0, True, scale=scale
        )
        group.put_(grads[0], found[0])
        for whole, part in zip(grads[1:], found[1:], strict=True):
            group.put_(whole, part.sum(1, keepdim=True))
    return grads


@packed_attention_backward.register_fake
def _(
    grad_TQD: Tensor,
    q_TQD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_TQD: Tensor,
    lse_QT: Tensor,
    ends: Tensor,
    longest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_TQD), torch.empty_like(k_TKD), torch.empty_like(v_TKD)


def _save(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:  # type: ignore[type-arg]
    *tensors, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors, *output)  # type: ignore[attr-defined]


def _backward(ctx: object, grad_TQD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_TQD, k_TKD, v_TKD, ends, longest, out_TQD, lse_QT = ctx.saved_tensors  # type: ignore[attr-defined]
    saved = q_TQD, k_TKD, v_TKD, out_TQD, lse_QT, ends, longest
    grads = packed_attention_backward(grad_TQD, *saved, ctx.scale)  # type: ignore[attr-defined]
    return (*grads, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Group:
    """Documents for one call of the CPU's kernel.

    Shorter ones are padded behind their end, where causal attention does not look.

    span: first token and the one after the last, where it is one document.
    index_NL: tokens of several; padding repeats the last one of its document.
    real_NL: which are none; None where all have the same length.
    """

    span: tuple[int, int]
    index_NL: Tensor | None = None
    real_NL: Tensor | None = None

    def take(self, x_THD: Tensor, num_keys: int) -> Tensor:
        """The group's rows of (T, H, D), as (N * K, H / K, L, D)."""
        x_NLHD = x_THD[None, slice(*self.span)] if self.index_NL is None else x_THD[self.index_NL]
        return x_NLHD.unflatten(2, (num_keys, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    def heads(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, all (N * K, G, L, D); keys and values repeat without a copy."""
        q, k, v = (self.take(x, k_TKD.shape[1]) for x in (q_TQD, k_TKD, v_TKD))
        return q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)

    def without_padding(self, grad: Tensor) -> Tensor:
        """`grad`, (N * K, G, L, D), with zeros where no token is."""
        if self.real_NL is None:
            return grad
        per_document = grad.unflatten(0, (len(self.real_NL), -1))
        return (per_document * self.real_NL[:, None, None, :, None]).flatten(0, 1)

    def put_(self, x_THD: Tensor, part: Tensor) -> None:
        """Write the group's rows, (N * K, H / K, L, D), to (T, H, D)."""
        num_documents = 1 if self.index_NL is None else len(self.index_NL)
        x_NLHD = part.unflatten(0, (num_documents, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        if self.index_NL is None:
            x_THD[slice(*self.span)] = x_NLHD[0]
        elif self.real_NL is None:
            x_THD[self.index_NL] = x_NLHD
        else:
            x_THD[self.index_NL[self.real_NL]] = x_NLHD[self.real_NL]


def _groups_of(ends: Tensor, q_TQD: Tensor) -> tuple[_Group, ...]:
    """The documents of a block in groups; the same block's are remembered, one layer after the other asks."""
    edges = tuple(ends.tolist())
    assert edges[0] == 0, "the first document begins with the first token"
    assert edges[-1] == len(q_TQD), "the last document ends with the last token"
    return _groups(edges, int(CALL_FLOPS / (2 * q_TQD.shape[1] * q_TQD.shape[2])))


@lru_cache(maxsize=4)
def _groups(edges: tuple[int, ...], free_scores: int) -> tuple[_Group, ...]:
    """Documents between `edges`, longest first; one joins a group if padding it costs `free_scores` at most."""
    spans = sorted((pair for pair in pairwise(edges) if pair[0] < pair[1]), key=lambda pair: pair[0] - pair[1])
    groups: list[list[tuple[int, int]]] = []
    for begin, end in spans:
        first_begin, first_end = groups[-1][0] if groups else (0, 0)
        if groups and (first_end - first_begin) ** 2 - (end - begin) ** 2 <= free_scores:
            groups[-1].append((begin, end))
        else:
            groups.append([(begin, end)])
    return tuple(_group(group) for group in groups)


def _group(spans: list[tuple[int, int]]) -> _Group:
    if len(spans) == 1:
        return _Group(spans[0])
    begins, ends = torch.tensor(spans).unbind(1)
    lengths, length = ends - begins, spans[0][1] - spans[0][0]
    offsets = torch.arange(length)
    index_NL = begins[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    even = bool((lengths == length).all())
    return _Group((0, 0), index_NL, None if even else offsets < lengths[:, None])
