"""The products of the device path as torch's grouped_mm; base and low-rank path in one where there is padding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, pad, silu

from finetune.kernels.blocks import blocks_of, rounded_rank
from finetune.kernels.decoded import decode
from finetune.kernels.device_path import Inputs, Saved, SwigluGradients
from finetune.kernels.layer import ExpertLayer, Factors, Stack
from finetune.kernels.sorted_rows import SortedRows


class RowWork(Protocol):
    """What is done around the products; every output is given."""

    def write_lora_padding(self, lora: Factors, a_ERI: Tensor, b_EOR: Tensor) -> None: ...  # noqa: D102
    def gather(self, x_TH: Tensor, token_P: Tensor, out_PH: Tensor) -> None: ...  # noqa: D102
    def swiglu(self, gate_up_PG: Tensor, h_PI: Tensor) -> None: ...  # noqa: D102
    def swiglu_back(  # noqa: D102
        self, gate_up_PG: Tensor, d_h_PI: Tensor, weights_TK: Tensor, pair_P: Tensor, into: SwigluGradients
    ) -> None: ...
    def combine(self, rows_PH: Tensor, row_P: Tensor, weights_TK: Tensor | None, out_TH: Tensor) -> None: ...  # noqa: D102
    def factor_grad(  # noqa: D102
        self, grad_XRN: Tensor, thin_PR: Tensor, wide_PN: Tensor, slot_E: Tensor, rows: SortedRows
    ) -> None: ...


class TorchRowWork:
    """Row work in torch's own operations."""

    def write_lora_padding(self, lora: Factors, a_ERI: Tensor, b_EOR: Tensor) -> None:
        """A and scale B of every expert, zero for frozen ones."""
        a_ERI.copy_(_per_expert(lora.a_XRI, lora, a_ERI.dtype))
        torch.mul(_per_expert(lora.b_XOR.mT, lora, b_EOR.dtype).mT, lora.scale, out=b_EOR)

    def gather(self, x_TH: Tensor, token_P: Tensor, out_PH: Tensor) -> None:
        """`out = x[token]`."""
        torch.index_select(x_TH, 0, token_P, out=out_PH)

    def swiglu(self, gate_up_PG: Tensor, h_PI: Tensor) -> None:
        """`h = silu(gate) up`."""
        gate_PI, up_PI = gate_up_PG.chunk(2, dim=1)
        torch.mul(silu(gate_PI), up_PI, out=h_PI)

    def swiglu_back(
        self, gate_up_PG: Tensor, d_h_PI: Tensor, weights_TK: Tensor, pair_P: Tensor, into: SwigluGradients
    ) -> None:
        """SwiGLU's gradients with the routing weight folded in, and the weight's own."""
        gate_PI, up_PI = gate_up_PG.chunk(2, dim=1)
        d_gate_PI, d_up_PI = into.gate_up_PG.chunk(2, dim=1)
        weight_P1 = weights_TK.reshape(-1, 1).index_select(0, pair_P).to(d_h_PI.dtype)
        silu_PI = silu(gate_PI)
        h_PI = silu_PI * up_PI
        torch.mul(h_PI, weight_P1, out=into.weighted_h_PI)
        into.weight_P.index_copy_(0, pair_P.long(), h_PI.mul_(d_h_PI).sum(1, dtype=torch.float32))
        weighted_PI = d_h_PI * weight_P1
        torch.mul(weighted_PI, silu_PI, out=d_up_PI)
        d_gate_PI.copy_(torch.ops.aten.silu_backward(weighted_PI.mul_(up_PI), gate_PI))

    def combine(self, rows_PH: Tensor, row_P: Tensor, weights_TK: Tensor | None, out_TH: Tensor) -> None:
        """Weighted sum over the rows of each token, in the order of k."""
        weights_TK = None if weights_TK is None else weights_TK.to(rows_PH.dtype)
        out_TH.copy_(embedding_bag(row_P.view(len(out_TH), -1), rows_PH, per_sample_weights=weights_TK, mode="sum"))

    def factor_grad(self, grad_XRN: Tensor, thin_PR: Tensor, wide_PN: Tensor, slot_E: Tensor, rows: SortedRows) -> None:
        """`G[slot] = thin^T wide` over the rows of the slot's expert."""
        num_slots, rank, _ = grad_XRN.shape
        grad_ERN = grouped_mm(thin_PR.t(), wide_PN, offs=rows.end_E)
        expert_X = slot_E.new_empty(num_slots + 1)
        expert_X.scatter_(
            0, torch.where(slot_E < 0, num_slots, slot_E), torch.arange(len(slot_E), device=slot_E.device)
        )
        grad_XRN.copy_(grad_ERN.index_select(0, expert_X[:num_slots])[:, :rank])


class GroupedProjection:
    """One bank with its factors, for one forward or one backward.

    The factors are written around the bank where there is padding, else laid out per expert, zero for frozen experts.
    """

    def __init__(self, bank_EOI: Tensor, padding: int, lora: Factors | None, dtype: torch.dtype, work: RowWork) -> None:
        self.weight_EOI, self.rank, self._blocks = bank_EOI.to(dtype), 0, None
        if lora is None:
            return
        self.rank = rounded_rank(lora.a_XRI.shape[1])
        num_experts, self._height, self._width = bank_EOI.shape
        if padding >= self.rank and bank_EOI.dtype == dtype:
            self._blocks = blocks_of(bank_EOI, padding)
            self.a_ERI = self._blocks[:, self._height : self._height + self.rank, : self._width]
            self.b_EOR = self._blocks[:, : self._height, self._width : self._width + self.rank]
        else:
            self.a_ERI = self.weight_EOI.new_empty(num_experts, self.rank, self._width)
            self.b_EOR = self.weight_EOI.new_empty(num_experts, self._height, self.rank)
        work.write_lora_padding(lora, self.a_ERI, self.b_EOR)

    @property
    def padding(self) -> int:
        """Columns that the rows of this projection's inputs and gradients should have to spare."""
        return 0 if self._blocks is None else self.rank

    def forward(self, x_PI: Tensor, z_PR: Tensor | None, end_E: Tensor) -> Tensor:
        """`x W^T + scale z B^T`. x: a part of rows with `padding` columns to spare."""
        if z_PR is not None and self._blocks is not None:
            weight_EOI = self._blocks[:, : self._height, : self._width + self.rank]
            return grouped_mm(_widened(x_PI, z_PR), weight_EOI.mT, offs=end_E)
        y_PO = grouped_mm(x_PI, self.weight_EOI.mT, offs=end_E)
        return y_PO if z_PR is None else y_PO.add_(grouped_mm(z_PR, self.b_EOR.mT, offs=end_E))

    def back(self, d_y_PO: Tensor, dz_PR: Tensor | None, keep: Tensor | None, end_E: Tensor) -> Tensor:
        """`dy W + keep dz A`. dy: a part of rows with `padding` columns to spare."""
        if dz_PR is not None and keep is None and self._blocks is not None:
            weight_EOI = self._blocks[:, : self._height + self.rank, : self._width]
            return grouped_mm(_widened(d_y_PO, dz_PR), weight_EOI, offs=end_E)
        d_x_PI = grouped_mm(d_y_PO, self.weight_EOI, offs=end_E)
        if dz_PR is None:
            return d_x_PI
        low_rank_PI = grouped_mm(dz_PR, self.a_ERI, offs=end_E)
        return d_x_PI.add_(low_rank_PI) if keep is None else d_x_PI.addcmul_(low_rank_PI, keep)


class GroupedProducts:
    """`device_path.Products` of one forward or one backward."""

    def __init__(
        self,
        layer: ExpertLayer,
        rows: SortedRows,
        dtype: torch.dtype,
        padding: list[int],
        work: RowWork,
        *,
        keep: bool = False,
    ) -> None:
        self.rows, self._token_P, self._work = rows, rows.token_P, work
        stacks, loras = (layer.gate_up_EGH, layer.down_EHI), (layer.gate_up_lora, layer.down_lora)
        self._gate_up, self._down = (
            GroupedProjection(*_bank(stack, lora, dtype, space, rows.end_E, keep), lora, dtype, work)
            for stack, lora, space in zip(stacks, loras, padding, strict=True)
        )
        self._of = {id(layer.gate_up_lora): self._gate_up, id(layer.down_lora): self._down}

    def inputs(self, x_TH: Tensor) -> Inputs:
        """The rows of some tokens, gathered; x forward or the output's gradient backward."""
        x_PH = self._rows(x_TH, x_TH.shape[1], max(self._gate_up.padding, self._down.padding))
        self._work.gather(x_TH, self._token_P, x_PH)
        return Inputs(x_PH)

    def low_rank(self, lora: Factors, x: Inputs) -> Tensor:
        """`z = x A^T`, zero for frozen experts."""
        return grouped_mm(x.values, self._of[id(lora)].a_ERI.mT, offs=self.rows.end_E)

    def low_rank_back(self, lora: Factors, d_y: Inputs) -> Tensor:
        """`dz = scale dy B`, zero for frozen experts."""
        return grouped_mm(d_y.values, self._of[id(lora)].b_EOR, offs=self.rows.end_E)

    def gate_up(self, x: Inputs, z: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        """The product, and SwiGLU in rows with padding for down's z."""
        gate_up_PG = self._gate_up.forward(x.values, z, self.rows.end_E)
        h_PI = self._rows(gate_up_PG, gate_up_PG.shape[1] // 2, self._down.padding)
        self._work.swiglu(gate_up_PG, h_PI)
        return gate_up_PG, h_PI

    def down(self, h_PI: Tensor, z: Tensor | None) -> Tensor:
        """`h W^T + scale z B^T`."""
        return self._down.forward(h_PI, z, self.rows.end_E)

    def down_back(self, d_y: Inputs, dz: Tensor | None, saved: Saved) -> SwigluGradients:
        """`dh = dy W + keep dz A`, then SwiGLU's gradients in rows with padding for gate_up's dz."""
        d_h_PI = self._down.back(d_y.values, dz, saved.keep_PI, self.rows.end_E)
        into = SwigluGradients(
            self._rows(d_h_PI, saved.gate_up_PG.shape[1], self._gate_up.padding),
            self._rows(d_h_PI, d_h_PI.shape[1], 0),
            d_h_PI.new_empty(len(d_h_PI), dtype=torch.float32),
        )
        self._work.swiglu_back(saved.gate_up_PG, d_h_PI, saved.weights_TK, self.rows.pair_P, into)
        return into

    def gate_up_back(self, d_y_PG: Tensor, dz: Tensor | None, keep_PH: Tensor | None) -> Tensor:
        """`dx = dy W + keep dz A`."""
        return self._gate_up.back(d_y_PG, dz, keep_PH, self.rows.end_E)

    def a_grad(self, lora: Factors, dz: Tensor, x: Inputs) -> Tensor:
        """`dA = dz^T x`."""
        grad_XRI = lora.a_XRI.new_empty(lora.a_XRI.shape)
        self._work.factor_grad(grad_XRI, dz, x.values, lora.slot_of_expert, self.rows)
        return grad_XRI

    def b_grad(self, lora: Factors, z: Tensor, d_y: Inputs) -> Tensor:
        """`dB = dy^T (scale z)`."""
        grad_XOR = lora.b_XOR.new_empty(lora.b_XOR.shape)
        self._work.factor_grad(grad_XOR.mT, z * lora.scale, d_y.values, lora.slot_of_expert, self.rows)
        return grad_XOR

    def combine(self, rows_PH: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Sum over the experts of each token."""
        out_TH = rows_PH.new_empty(self.rows.row_P.shape[0] // self.rows.num_k, rows_PH.shape[1])
        self._work.combine(rows_PH, self.rows.row_P, weights_TK, out_TH)
        return out_TH

    def _rows(self, like: Tensor, width: int, padding: int) -> Tensor:
        """New rows of `width` columns, each followed by `padding` to spare."""
        return like.new_empty(self.rows.pair_P.shape[0], width + padding)[:, :width]


def _bank(
    stack: Stack, lora: Factors | None, dtype: torch.dtype, padding: int, end_E: Tensor, keep: bool
) -> tuple[Tensor, int]:
    """A bank and the padding around it; packed weights are decoded into padded block matrices."""
    if isinstance(stack, Tensor):
        return stack, padding
    _, height, width = stack.shape
    padding = 0 if lora is None else rounded_rank(lora.a_XRI.shape[1])
    blocks = decode(stack, dtype, padding, end_E, keep=keep)
    return blocks[:, :height, :width], padding


def _widened(rows_PN: Tensor, thin_PR: Tensor) -> Tensor:
    """`[rows | thin]`, thin written into the columns to spare after each row: `cat` would copy the wide rows."""
    width, rank = rows_PN.shape[1], thin_PR.shape[1]
    wide = rows_PN.as_strided((len(rows_PN), width + rank), rows_PN.stride(), rows_PN.storage_offset())
    wide[:, width:] = thin_PR
    return wide


def _per_expert(factor_XRN: Tensor, lora: Factors, dtype: torch.dtype) -> Tensor:
    """A factor for every expert in the compute dtype, its rank padded with zeros; zero for frozen experts."""
    slot_E = lora.slot_of_expert
    factor_ERN = factor_XRN.to(dtype).index_select(0, slot_E.clamp(min=0))
    factor_ERN = factor_ERN.masked_fill_((slot_E < 0)[:, None, None], 0)
    rank = factor_ERN.shape[1]
    return pad(factor_ERN, (0, 0, 0, rounded_rank(rank) - rank))
