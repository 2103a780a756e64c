"""Products of an expert bank for a block of experts at a time, as batched products of rows padded to equal number.

The way for small experts, where calling one product per expert costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from finetune.kernels.layer import Factors, Stack, weights_of
from finetune.kernels.pairs import Block

FactorGrads = tuple[Tensor, Tensor]
Sides = tuple[Tensor, Tensor]


class PaddedProjection:
    """One projection of all experts, W_e + scale * B_e A_e, for one forward or one backward.

    All segments of a block have the same size. Frozen experts carry zero factors through the products; gradients are
    kept for trained ones only. Padding rows hold zeros, forward and backward. Thin operands are laid out with the rank
    outside, (experts, R, rows): batched products are fastest so.
    """

    def __init__(self, weight_EOI: Stack, lora: Factors | None, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        experts = [expert for block in blocks for expert in block.experts]
        firsts = accumulate((len(block.experts) for block in blocks[:-1]), initial=0)
        self._first = {block.start: first for block, first in zip(blocks, firsts, strict=True)}
        self._weight_EOI = weights_of(weight_EOI, experts, dtype)
        self._slot = [-1] * weight_EOI.shape[0] if lora is None else lora.slot_of_expert.tolist()
        self._has_lora = any(self._slot[expert] >= 0 for expert in experts)
        if lora is not None and self._has_lora:
            self._scale = lora.scale
            slots = [self._slot[expert] for expert in experts]
            self._a_ERI = _slots(lora.a_XRI.to(dtype), slots)
            self._b_ERO = _slots(lora.b_XOR.to(dtype), slots).mT.contiguous()

    def through_a(self, block: Block, x_lora_NI: Tensor) -> Tensor | None:
        """`z^T = A x_lora^T`; None without factors."""
        return torch.bmm(self._of(block, self._a_ERI), _batched(block, x_lora_NI).mT) if self._has_lora else None

    def through_b(self, block: Block, dy_NO: Tensor) -> Tensor | None:
        """`dz^T = B^T dy^T`, without the scale; None without factors."""
        return torch.bmm(self._of(block, self._b_ERO), _batched(block, dy_NO).mT) if self._has_lora else None

    def scaled(self, block: Block, z: Tensor, weight_N1: Tensor | None) -> Tensor:
        """Rows of z times the scale and, if given, their routing weights."""
        return z * (self._scale if weight_N1 is None else _batched(block, weight_N1).mT * self._scale)

    def project_(self, block: Block, y_NO: Tensor, x_NI: Tensor, z: Tensor | None) -> None:
        """`y = x W^T + scale z B^T`."""
        y = _batched(block, y_NO)
        torch.bmm(_batched(block, x_NI), self._of(block, self._weight_EOI).mT, out=y)
        if z is not None:
            y.baddbmm_(z.mT, self._of(block, self._b_ERO), alpha=self._scale)

    def project_back_(
        self, block: Block, dx_NI: Tensor, dy_NO: Tensor, dz: Tensor | None, keep_NI: Tensor | None
    ) -> None:
        """`dx = dy W + keep * scale dz A`."""
        dx = _batched(block, dx_NI)
        torch.bmm(_batched(block, dy_NO), self._of(block, self._weight_EOI), out=dx)
        if dz is None:
            return
        a_ERI = self._of(block, self._a_ERI)
        if keep_NI is None:
            dx.baddbmm_(dz.mT, a_ERI, alpha=self._scale)
        else:
            dx.addcmul_(torch.bmm(dz.mT, a_ERI), _batched(block, keep_NI), value=self._scale)

    def factor_grads_(self, block: Block, grads: FactorGrads, a_side: Sides, b_side: Sides) -> None:
        """`dA = dz^T x_lora` and `dB = dy^T z` into the slots of the block's experts, dz and z `scaled`.

        a_side: dz and x_lora (N, in). b_side: z and dy (N, out).
        """
        trained = [i for i, expert in enumerate(block.experts) if self._slot[expert] >= 0]
        slots = torch.tensor([self._slot[block.experts[i]] for i in trained], device=grads[0].device, dtype=torch.long)
        for grad, (thin, wide) in zip((grads[0], grads[1].mT), (a_side, b_side), strict=True):
            product = torch.bmm(thin, _batched(block, wide))
            grad.index_copy_(0, slots, product if len(trained) == len(product) else product[trained])

    def _of(self, block: Block, stack: Tensor) -> Tensor:
        """The part of a stack in the order of the blocks' experts that belongs to a block."""
        return stack.narrow(0, self._first[block.start], len(block.experts))


def _batched(block: Block, rows: Tensor) -> Tensor:
    """The (N, ...) rows of a block as (experts, N / experts, ...)."""
    return rows.view(len(block.experts), block.sizes[0], *rows.shape[1:])


def _select(stack: Tensor, index: Sequence[int]) -> Tensor:
    """The rows `index` of a stack; no copy when they are all of them in order."""
    if list(index) == list(range(len(stack))):
        return stack
    return stack.index_select(0, torch.tensor(index, device=stack.device))


def _slots(factor_X: Tensor, slots: Sequence[int]) -> Tensor:
    """The factors in `slots`, zero where a slot is -1."""
    chosen = _select(factor_X, [max(slot, 0) for slot in slots])
    if min(slots) >= 0:
        return chosen
    frozen = torch.tensor([slot < 0 for slot in slots], device=chosen.device)
    return chosen.masked_fill(frozen[:, None, None], 0)
