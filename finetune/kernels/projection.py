"""Products of an expert bank for a block of experts: W + BA is never built, and neither is a gradient of a frozen W.

A block's rows are (N, ...) with equally many of each of its experts, so the low-rank products are batched ones.
The product with W is one product per expert where experts are big, and batched as well where they are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.kernels.layer import Deltas, Factors, Stack, weights_of
from finetune.kernels.token_blocks import Block


class FactorGrads(NamedTuple):
    """Gradients of A (X, R, in) and B (X, out, R)."""

    a_XRI: Tensor
    b_XOR: Tensor


class _Slots(NamedTuple):
    """The factors of one block's experts in the compute dtype, and where they come from."""

    a_YRI: Tensor
    b_YOR: Tensor
    scale: float
    index_Y: Tensor


class Projection:
    """One projection of all experts, W_e + delta_e + scale * B_e A_e, for one forward or one backward.

    batched: multiply by the W of a whole block at once.

    The experts of a block all have factors, or none has; `z` and `dz` are (experts, rows, R), None without factors.
    The factors of a block are gathered and cast when it is first asked for, while they fit the cache: blocks are gone
    through one after another.
    """

    def __init__(
        self,
        weight_EOI: Stack,
        lora: Factors | None,
        delta: Deltas | None,
        dtype: torch.dtype,
        *,
        batched: bool,
    ) -> None:
        self._weight_EOI, self._lora, self._dtype, self._batched = weight_EOI, lora, dtype, batched
        self._delta, self._delta_slot = delta, [] if delta is None else delta.slot_of_expert.tolist()
        self._slot_of_expert = [] if lora is None else lora.slot_of_expert.tolist()
        self._at: tuple[Block, _Slots | None] | None = None
        self._weights: Sequence[Tensor] | None = None  # views made at once: one for each product takes a while
        if isinstance(weight_EOI, Tensor) and weight_EOI.dtype == dtype and delta is None and not batched:
            self._weights = weight_EOI.unbind()

    def through_a(self, block: Block, x_lora_NI: Tensor) -> Tensor | None:
        """`z = x_lora A^T`."""
        slots = self._slots(block)
        return None if slots is None else self._thin(block.batched(x_lora_NI), slots.a_YRI.mT)

    def through_b(self, block: Block, dy_NO: Tensor) -> Tensor | None:
        """`dz = dy B`, without the scale."""
        slots = self._slots(block)
        return None if slots is None else self._thin(block.batched(dy_NO), slots.b_YOR)

    def project_(self, block: Block, y_NO: Tensor, x_NI: Tensor, z: Tensor | None) -> None:
        """`y = x W^T + scale z B^T`."""
        self._multiply_(block, y_NO, x_NI, transpose=True)
        slots = self._slots(block)
        if slots is not None and z is not None:
            block.batched(y_NO).baddbmm_(z, slots.b_YOR.mT, alpha=slots.scale)

    def project_back_(
        self, block: Block, dx_NI: Tensor, dy_NO: Tensor, dz: Tensor | None, keep_NI: Tensor | None
    ) -> None:
        """`dx = dy W + keep * scale dz A`."""
        self._multiply_(block, dx_NI, dy_NO, transpose=False)
        slots = self._slots(block)
        if slots is None or dz is None:
            return
        dx = block.batched(dx_NI)
        if keep_NI is None:
            dx.baddbmm_(dz, slots.a_YRI, alpha=slots.scale)
        else:
            dx.addcmul_(torch.bmm(dz, slots.a_YRI), block.batched(keep_NI), value=slots.scale)

    def factor_grads_(
        self, block: Block, grads: FactorGrads, a_side: tuple[Tensor, Tensor], b_side: tuple[Tensor, Tensor]
    ) -> None:
        """`dA = scale dz^T x_lora` and `dB = scale dy^T z` into the slots of the block's experts.

        a_side: dz and x_lora (N, in). b_side: z and dy (N, out). dz and z come times the scale.
        """
        slots = self._slots(block)
        if slots is None:
            return
        (dz, x_lora_NI), (z, dy_NO) = a_side, b_side
        d_a_YRI = torch.bmm(dz.mT, block.batched(x_lora_NI))
        d_b_YOR = self._thin(block.batched(dy_NO).mT, z)
        for grad, product in ((grads.a_XRI, d_a_YRI), (grads.b_XOR, d_b_YOR)):
            grad.index_copy_(0, slots.index_Y, product.to(grad.dtype))

    def delta_grads_(self, block: Block, grad_XOI: Tensor, x_NI: Tensor, d_y_NO: Tensor) -> None:
        """`d delta = scale dy^T x` into the slots of the block's experts that train whole."""
        assert self._delta is not None
        for expert, x, d_y in zip(block.experts, block.batched(x_NI), block.batched(d_y_NO), strict=True):
            if (slot := self._delta_slot[expert]) >= 0:
                grad_XOI[slot] = torch.mm(d_y.mT, x).mul_(self._delta.scale)

    def scaled(self, thin: Tensor, block: Block, weight_N1: Tensor | None) -> Tensor:
        """Thin rows (z or dz) times the scale and, if given, the routing weights of the block's rows."""
        scale = 1.0 if self._lora is None else self._lora.scale
        return thin * (scale if weight_N1 is None else block.batched(weight_N1) * scale)

    def _thin(self, rows: Tensor, factor: Tensor) -> Tensor:
        """`rows factor`, whose last size is the rank: in float32 up to four times as fast with the rank first."""
        if self._dtype == torch.float32:
            return torch.bmm(factor.mT, rows.mT).mT
        return torch.bmm(rows, factor)

    def _multiply_(self, block: Block, out: Tensor, rows: Tensor, *, transpose: bool) -> None:
        """`out = rows W^T`, or `rows W`."""
        if self._batched:
            if self._delta is None:
                weight_YOI = weights_of(self._weight_EOI, block.experts, self._dtype)
            else:
                weight_YOI = torch.stack([self._weight(expert) for expert in block.experts])
            torch.bmm(block.batched(rows), weight_YOI.mT if transpose else weight_YOI, out=block.batched(out))
            return
        x_parts, y_parts = rows.split(block.parts), out.split(block.parts)
        for expert, x, y in zip(block.experts, x_parts[::2], y_parts[::2], strict=True):
            weight_OI = self._weight(expert)
            torch.mm(x, weight_OI.mT if transpose else weight_OI, out=y)
        torch._foreach_zero_(y_parts[1::2])

    def _weight(self, expert: int) -> Tensor:
        """W, with its delta if it has one, in the compute dtype."""
        if self._weights is not None:
            return self._weights[expert]
        if self._delta is not None and (slot := self._delta_slot[expert]) >= 0:
            delta_OI = self._delta.delta_XOI[slot]
            weight_OI = weights_of(self._weight_EOI, (expert,), delta_OI.dtype)[0]
            return torch.add(weight_OI, delta_OI, alpha=self._delta.scale).to(self._dtype)
        if isinstance(self._weight_EOI, Tensor):
            return self._weight_EOI[expert].to(self._dtype)
        return self._weight_EOI.weights_of((expert,), self._dtype)[0]

    def _slots(self, block: Block) -> _Slots | None:
        if self._at is None or self._at[0] is not block:
            self._at = block, self._cast(block)
        return self._at[1]

    def _cast(self, block: Block) -> _Slots | None:
        if self._lora is None or self._slot_of_expert[block.experts[0]] < 0:
            return None
        slots = [self._slot_of_expert[expert] for expert in block.experts]
        index_Y = torch.tensor(slots, device=self._lora.a_XRI.device)
        factors = (self._lora.a_XRI, self._lora.b_XOR)
        a_YRI, b_YOR = (factor.index_select(0, index_Y).to(self._dtype) for factor in factors)
        return _Slots(a_YRI, b_YOR, self._lora.scale, index_Y)
