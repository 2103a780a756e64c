"""The work between torch's grouped products as Triton kernels, each one pass over its rows."""

from __future__ import annotations

from torch import Tensor

from finetune.kernels.device_path import Inputs, SwigluGradients
from finetune.kernels.layer import Factors
from finetune.kernels.sorted_rows import SortedRows
from finetune.kernels.triton import rows as row_kernels
from finetune.kernels.triton import swiglu
from finetune.kernels.triton.factor_grads import factor_grad_
from finetune.kernels.triton.lora_padding import write_lora_padding


class TritonRowWork:
    """`grouped.RowWork` in Triton."""

    def write_lora_padding(self, lora: Factors, a_ERI: Tensor, b_EOR: Tensor) -> None:
        """A and scale B of every expert, zero for frozen ones."""
        write_lora_padding(lora, a_ERI, b_EOR)

    def gather(self, x_TH: Tensor, token_P: Tensor, out_PH: Tensor) -> None:
        """`out = x[token]`."""
        row_kernels.gather(x_TH, token_P, out_PH)

    def swiglu(self, gate_up_PG: Tensor, h_PI: Tensor) -> None:
        """`h = silu(gate) up`."""
        swiglu.forward(gate_up_PG, h_PI)

    def swiglu_back(
        self, gate_up_PG: Tensor, d_h_PI: Tensor, weights_TK: Tensor, pair_P: Tensor, into: SwigluGradients
    ) -> None:
        """All of SwiGLU's gradients in one pass."""
        swiglu.backward(gate_up_PG, d_h_PI, weights_TK, pair_P, into)

    def combine(self, rows_PH: Tensor, row_P: Tensor, weights_TK: Tensor | None, out_TH: Tensor) -> None:
        """Weighted sum over the rows of each token, in the order of k."""
        row_kernels.combine(rows_PH, row_P, weights_TK, out_TH)

    def factor_grad(self, grad_XRN: Tensor, thin_PR: Tensor, wide_PN: Tensor, slot_E: Tensor, rows: SortedRows) -> None:
        """`G[slot] = thin^T wide`, for trained slots only."""
        factor_grad_(grad_XRN, thin_PR, Inputs(wide_PN), slot_E, rows)
