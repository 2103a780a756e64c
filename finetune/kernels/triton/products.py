"""The products of the device path as Triton kernels: nothing is gathered to memory, factors are read where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels.decoded import decode
from finetune.kernels.device_path import Inputs, Saved, SwigluGradients
from finetune.kernels.layer import ExpertLayer, Factors
from finetune.kernels.sorted_rows import SortedRows
from finetune.kernels.triton import rows as row_kernels
from finetune.kernels.triton import swiglu
from finetune.kernels.triton.down_back import down_back
from finetune.kernels.triton.factor_grads import factor_grad_
from finetune.kernels.triton.gate_up import gate_up
from finetune.kernels.triton.project import LowRank, project
from finetune.kernels.triton.shapes import Workload
from finetune.kernels.triton.thin import thin
from finetune.kernels.triton.tiles import Tiling


class TritonProducts:
    """`device_path.Products` of one forward or one backward."""

    def __init__(self, layer: ExpertLayer, rows: SortedRows, dtype: torch.dtype, *, keep: bool = False) -> None:
        self.rows, self._tiling = rows, Tiling.of(rows, Workload.of(layer, dtype))
        self._gate_up_EGH, self._down_EHI = (
            stack.to(dtype) if isinstance(stack, Tensor) else decode(stack, dtype, 0, rows.end_E, keep=keep)
            for stack in (layer.gate_up_EGH, layer.down_EHI)
        )
        self._gate_up_lora, self._down_lora = layer.gate_up_lora, layer.down_lora

    def inputs(self, x_TH: Tensor) -> Inputs:
        """Tokens and where each row finds its own."""
        return Inputs(x_TH, self.rows.token_P)

    def low_rank(self, lora: Factors, x: Inputs) -> Tensor:
        """`z = x A^T`."""
        return thin(x, lora.a_XRI, lora.slot_of_expert, self._tiling, 1.0)

    def low_rank_back(self, lora: Factors, d_y: Inputs) -> Tensor:
        """`dz = scale dy B`."""
        return thin(d_y, lora.b_XOR.mT, lora.slot_of_expert, self._tiling, lora.scale)

    def gate_up(self, x: Inputs, z: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        """Gather, product and SwiGLU in one kernel."""
        return gate_up(x, self._gate_up_EGH, _through_b(self._gate_up_lora, z), self._tiling, keep=keep)

    def down(self, h_PI: Tensor, z: Tensor | None) -> Tensor:
        """`h W^T + scale z B^T`."""
        return project(Inputs(h_PI), self._down_EHI, _through_b(self._down_lora, z), self._tiling)

    def down_back(self, d_y: Inputs, dz: Tensor | None, saved: Saved) -> SwigluGradients:
        """Gather, product and SwiGLU's gradient in one kernel; in two with dropout, which masks dz A alone."""
        low_rank, weight_EIH = _through_a(self._down_lora, dz), self._down_EHI.mT
        gate_up_PG, weights_TK = saved.gate_up_PG, saved.weights_TK
        if low_rank is None or saved.keep_PI is None:
            return down_back(d_y, weight_EIH, low_rank, (gate_up_PG, weights_TK), self._tiling)
        d_h_PI = self._masked(d_y, weight_EIH, low_rank, saved.keep_PI)
        d_weight_P = d_h_PI.new_empty(len(d_h_PI), dtype=torch.float32)
        into = SwigluGradients(torch.empty_like(gate_up_PG), torch.empty_like(d_h_PI), d_weight_P)
        swiglu.backward(gate_up_PG, d_h_PI, weights_TK, self.rows.pair_P, into)
        return into

    def gate_up_back(self, d_y_PG: Tensor, dz: Tensor | None, keep_PH: Tensor | None) -> Tensor:
        """`dx = dy W + keep dz A`."""
        low_rank, weight_EHG = _through_a(self._gate_up_lora, dz), self._gate_up_EGH.mT
        if low_rank is None or keep_PH is None:
            return project(Inputs(d_y_PG), weight_EHG, low_rank, self._tiling)
        return self._masked(Inputs(d_y_PG), weight_EHG, low_rank, keep_PH)

    def a_grad(self, lora: Factors, dz: Tensor, x: Inputs) -> Tensor:
        """`dA = dz^T x`."""
        grad_XRI = lora.a_XRI.new_empty(lora.a_XRI.shape)
        factor_grad_(grad_XRI, dz, x, lora.slot_of_expert, self.rows)
        return grad_XRI

    def b_grad(self, lora: Factors, z: Tensor, d_y: Inputs) -> Tensor:
        """`dB = scale dy^T z`."""
        grad_XOR = lora.b_XOR.new_empty(lora.b_XOR.shape)
        factor_grad_(grad_XOR.mT, z, d_y, lora.slot_of_expert, self.rows, lora.scale)
        return grad_XOR

    def combine(self, rows_PH: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Sum over the experts of each token."""
        out_TH = rows_PH.new_empty(self.rows.row_P.shape[0] // self.rows.num_k, rows_PH.shape[1])
        row_kernels.combine(rows_PH, self.rows.row_P, weights_TK, out_TH)
        return out_TH

    def _masked(self, d_y: Inputs, weight: Tensor, low_rank: LowRank, keep: Tensor) -> Tensor:
        """`dy W + keep dz A`; the second product is one of depth zero plus its low-rank part."""
        low_rank_only = project(Inputs(d_y.values[:0]), weight[:, :, :0], low_rank, self._tiling)
        return project(d_y, weight, None, self._tiling).addcmul_(low_rank_only, keep)


def _through_b(lora: Factors | None, z: Tensor | None) -> LowRank | None:
    return None if lora is None or z is None else LowRank(z, lora.b_XOR, lora.slot_of_expert, lora.scale)


def _through_a(lora: Factors | None, dz: Tensor | None) -> LowRank | None:
    return None if lora is None or dz is None else LowRank(dz, lora.a_XRI.mT, lora.slot_of_expert, 1.0)
