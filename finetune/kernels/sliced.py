"""Products of an expert bank, one expert at a time on its contiguous slice of rows, LoRA added in place.

The way for big experts: W + BA is never built, and neither is a gradient of the frozen stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.kernels.layer import Factors, Stack, weights_of
from finetune.kernels.pairs import Block

FactorGrads = tuple[Tensor, Tensor]
Sides = tuple[Tensor, Tensor]


class SlicedProjection:
    """One projection of all experts, W_e + scale * B_e A_e, for one forward or one backward.

    Rows are in `dtype`; the factors are cast to it once, and only those of the experts in `blocks`. Rows of frozen
    experts in a (N, R) tensor are never written nor read.
    """

    def __init__(self, weight_EOI: Stack, lora: Factors | None, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        self._weight_EOI, self._dtype = weight_EOI, dtype
        self._slot = [-1] * weight_EOI.shape[0] if lora is None else lora.slot_of_expert.tolist()
        slots = [self._slot[expert] for block in blocks for expert in block.experts if self._slot[expert] >= 0]
        self._has_lora = bool(slots)
        if lora is not None and slots:
            self._scale = lora.scale
            self._a_XRI, self._b_XOR, self._place = _cast_slots(lora, slots, dtype)

    def through_a(self, block: Block, x_lora_NI: Tensor) -> Tensor | None:
        """`z = x_lora A^T`, (N, R); None without factors."""
        if not self._has_lora:
            return None
        z_NR = x_lora_NI.new_empty(len(x_lora_NI), self._a_XRI.shape[1])
        for slot, rows in self._trained(block):
            torch.mm(x_lora_NI[rows], self._a_XRI[self._place[slot]].t(), out=z_NR[rows])
        return z_NR

    def through_b(self, block: Block, dy_NO: Tensor) -> Tensor | None:
        """`dz = dy B`, (N, R), without the scale; None without factors."""
        if not self._has_lora:
            return None
        dz_NR = dy_NO.new_empty(len(dy_NO), self._a_XRI.shape[1])
        for slot, rows in self._trained(block):
            torch.mm(dy_NO[rows], self._b_XOR[self._place[slot]], out=dz_NR[rows])
        return dz_NR

    def scaled(self, block: Block, z: Tensor, weight_N1: Tensor | None) -> Tensor:
        """Rows of z times the scale and, if given, their routing weights."""
        return z * (self._scale if weight_N1 is None else weight_N1 * self._scale)

    def project_(self, block: Block, y_NO: Tensor, x_NI: Tensor, z: Tensor | None) -> None:
        """`y = x W^T + scale z B^T`."""
        for expert, slot, rows in self._slices(block):
            y = y_NO[rows]
            torch.mm(x_NI[rows], self._weight(expert).t(), out=y)
            if z is not None and slot >= 0:
                y.addmm_(z[rows], self._b_XOR[self._place[slot]].t(), alpha=self._scale)

    def project_back_(
        self, block: Block, dx_NI: Tensor, dy_NO: Tensor, dz: Tensor | None, keep_NI: Tensor | None
    ) -> None:
        """`dx = dy W + keep * scale dz A`."""
        for expert, slot, rows in self._slices(block):
            dx = dx_NI[rows]
            torch.mm(dy_NO[rows], self._weight(expert), out=dx)
            if dz is None or slot < 0:
                continue
            a_RI = self._a_XRI[self._place[slot]]
            if keep_NI is None:
                dx.addmm_(dz[rows], a_RI, alpha=self._scale)
            else:
                dx.addcmul_(torch.mm(dz[rows], a_RI), keep_NI[rows], value=self._scale)

    def factor_grads_(self, block: Block, grads: FactorGrads, a_side: Sides, b_side: Sides) -> None:
        """`dA = dz^T x_lora` and `dB = dy^T z` into the slots of the block's experts, dz and z `scaled`.

        a_side: dz and x_lora (N, in). b_side: z and dy (N, out).
        """
        (dz_NR, x_lora_NI), (z_NR, dy_NO) = a_side, b_side
        for slot, rows in self._trained(block):
            torch.mm(dz_NR[rows].t(), x_lora_NI[rows], out=grads[0][slot])
            torch.mm(dy_NO[rows].t(), z_NR[rows], out=grads[1][slot])

    def _slices(self, block: Block) -> Iterator[tuple[int, int, slice]]:
        start = 0
        for expert, size in zip(block.experts, block.sizes, strict=True):
            yield expert, self._slot[expert], slice(start, start + size)
            start += size

    def _trained(self, block: Block) -> Iterator[tuple[int, slice]]:
        return ((slot, rows) for _, slot, rows in self._slices(block) if slot >= 0)

    def _weight(self, expert: int) -> Tensor:
        return weights_of(self._weight_EOI, (expert,), self._dtype)[0]


def _cast_slots(lora: Factors, slots: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Sequence[int]]:
    """A and B in `dtype` for at least `slots`, and the place of each slot in them."""
    a_XRI, b_XOR = lora.a_XRI, lora.b_XOR
    num_slots = len(a_XRI)
    if (a_XRI.dtype == dtype and b_XOR.dtype == dtype) or len(slots) == num_slots:
        return a_XRI.to(dtype), b_XOR.to(dtype), range(num_slots)
    index = torch.tensor(slots, device=a_XRI.device)
    place = [-1] * num_slots
    for i, slot in enumerate(slots):
        place[slot] = i
    return a_XRI.index_select(0, index).to(dtype), b_XOR.index_select(0, index).to(dtype), place
