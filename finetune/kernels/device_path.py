"""The expert MLP with LoRA for accelerators: what is computed, in what order, with nothing read to the host.

The products behind it are Triton's (`kernels.triton.products`) or torch's grouped_mm (`kernels.grouped`). Saved for
backward: x, the gate_up output unless it is computed again, gate_up's z, the order of the rows, the routing weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from finetune.kernels.layer import ExpertLayer, Factors
from finetune.kernels.sorted_rows import SortedRows


class Inputs(NamedTuple):
    """Rows by expert: `values[source]`, gathered by whoever reads them, or `values` itself when source is None."""

    values: Tensor
    source: Tensor | None = None

    def rows(self) -> Tensor:
        """The rows themselves."""
        return self.values if self.source is None else self.values.index_select(0, self.source)


class SwigluGradients(NamedTuple):
    """What comes back through down and SwiGLU.

    gate_up_PG: gradient of [gate; up]; its rows may be part of wider ones.
    weighted_h_PI: w h, which the gradient of down's A reads; likewise.
    weight_P: gradient of the routing weight of each pair, in the order of the pairs.
    """

    gate_up_PG: Tensor
    weighted_h_PI: Tensor
    weight_P: Tensor


class Saved(NamedTuple):
    """What backward through down reads: [gate; up] (P, G), the routing weights (T, K), and what dropout kept of h."""

    gate_up_PG: Tensor
    weights_TK: Tensor
    keep_PI: Tensor | None


class Products(Protocol):
    """The products of one call; z and dz are None without factors, and unwritten for the rows of frozen experts."""

    rows: SortedRows

    def inputs(self, x_TH: Tensor) -> Inputs:
        """The rows of some tokens."""

    def low_rank(self, lora: Factors, x: Inputs) -> Tensor:
        """`z = x A^T`, (P, R)."""

    def low_rank_back(self, lora: Factors, d_y: Inputs) -> Tensor:
        """`dz = scale dy B`, (P, R)."""

    def gate_up(self, x: Inputs, z: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        """`x W^T + scale z B^T` (P, 2I), which may be empty unless kept, and `h = silu(gate) up` (P, I)."""

    def down(self, h_PI: Tensor, z: Tensor | None) -> Tensor:
        """`h W^T + scale z B^T`, (P, H)."""

    def down_back(self, d_y: Inputs, dz: Tensor | None, saved: Saved) -> SwigluGradients:
        """From the gradient of each row's output before its routing weight: `dh = dy W + keep dz A`, and SwiGLU's."""

    def gate_up_back(self, d_y_PG: Tensor, dz: Tensor | None, keep_PH: Tensor | None) -> Tensor:
        """`dx = dy W + keep dz A`, (P, H)."""

    def a_grad(self, lora: Factors, dz: Tensor, x: Inputs) -> Tensor:
        """`dA = dz^T x` for trained slots, like A."""

    def b_grad(self, lora: Factors, z: Tensor, d_y: Inputs) -> Tensor:
        """`dB = scale dy^T z` for trained slots, like B."""

    def combine(self, rows_PH: Tensor, weights_TK: Tensor | None) -> Tensor:
        """`sum_k w_tk rows[row of (t, k)]`, (T, H), in the order of k; w = 1 without weights."""


@dataclass(frozen=True)
class Masks:
    """What dropout keeps of each row of x (P, H) and of h (P, I), 0 and 1 in the compute dtype."""

    x_PH: Tensor
    h_PI: Tensor

    @classmethod
    def of(cls, layer: ExpertLayer, rows: SortedRows, dtype: torch.dtype) -> Masks | None:
        """The masks of a call; None without dropout."""
        if layer.dropout is None or (layer.gate_up_lora is None and layer.down_lora is None):
            return None
        device, (_, hidden, intermediate) = layer.down_EHI.device, layer.down_EHI.shape
        num_pairs = rows.pair_P.shape[0]
        keep_TH = layer.dropout.token_mask(num_pairs // rows.num_k, hidden, device)
        keep_PI = layer.dropout.pair_mask(num_pairs, intermediate, device)
        return cls(keep_TH.index_select(0, rows.token_P).to(dtype), keep_PI.index_select(0, rows.pair_P).to(dtype))


def with_gain(layer: ExpertLayer) -> ExpertLayer:
    """The layer with dropout's gain in the scales of its factors."""
    if layer.dropout is None:
        return layer
    gain = layer.dropout.gain
    gate_up, down = (
        None if lora is None else replace(lora, scale=lora.scale * gain)
        for lora in (layer.gate_up_lora, layer.down_lora)
    )
    return replace(layer, gate_up_lora=gate_up, down_lora=down)


def forward(
    x_TH: Tensor, weights_TK: Tensor, layer: ExpertLayer, products: Products, *, keep_gate_up: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output (T, H), the gate_up output (P, G), empty unless kept, and gate_up's z. x in the compute dtype."""
    masks, x = Masks.of(layer, products.rows, x_TH.dtype), products.inputs(x_TH)
    keep_x, keep_h = (masks.x_PH, masks.h_PI) if masks else (None, None)
    z = _low_rank(products, layer.gate_up_lora, x, keep_x)
    gate_up_PG, h_PI = products.gate_up(x, z, keep_gate_up)
    z_down = _low_rank(products, layer.down_lora, Inputs(h_PI), keep_h)
    return products.combine(products.down(h_PI, z_down), weights_TK), gate_up_PG, z


@dataclass(frozen=True)
class Needs:
    """Which gradients to compute."""

    x: bool
    weights: bool
    gate_up: bool
    down: bool


def backward(
    d_out_TH: Tensor,
    saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    layer: ExpertLayer,
    products: Products,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of x, the weights, gate_up's A and B, down's A and B; None for those not needed.

    saved: x, the weights, the gate_up output or None to compute it again, and gate_up's z.
    """
    x_TH, weights_TK, gate_up_PG, z = saved
    masks, x, d_y = Masks.of(layer, products.rows, x_TH.dtype), products.inputs(x_TH), products.inputs(d_out_TH)
    gate_up_lora, down_lora, grads = layer.gate_up_lora, layer.down_lora, _Grads()
    keep_x, keep_h = (masks.x_PH, masks.h_PI) if masks else (None, None)
    if gate_up_PG is None:
        gate_up_PG, _ = products.gate_up(x, z, True)
    dz = products.low_rank_back(down_lora, d_y) if down_lora else None
    d_gate_up_PG, weighted_h_PI, d_weight_P = products.down_back(d_y, dz, Saved(gate_up_PG, weights_TK, keep_h))
    if needs.weights:
        grads.weights = d_weight_P.view(weights_TK.shape)
    if needs.down and down_lora and dz is not None:
        x_lora = _drop(Inputs(weighted_h_PI), keep_h)
        z_down = products.low_rank(down_lora, x_lora)
        grads.down = products.a_grad(down_lora, dz, x_lora), products.b_grad(down_lora, z_down, d_y)
    if not (needs.x or needs.gate_up):
        return grads.in_order()
    d_gate_up = Inputs(d_gate_up_PG)
    dz = products.low_rank_back(gate_up_lora, d_gate_up) if gate_up_lora else None
    if needs.gate_up and gate_up_lora and dz is not None and z is not None:
        a_grad = products.a_grad(gate_up_lora, dz, _drop(x, keep_x))
        grads.gate_up = a_grad, products.b_grad(gate_up_lora, z, d_gate_up)
    if needs.x:
        grads.x = products.combine(products.gate_up_back(d_gate_up_PG, dz, keep_x), None)
    return grads.in_order()


@dataclass
class _Grads:
    x: Tensor | None = None
    weights: Tensor | None = None
    gate_up: Sequence[Tensor | None] = (None, None)
    down: Sequence[Tensor | None] = (None, None)

    def in_order(self) -> list[Tensor | None]:
        return [self.x, self.weights, *self.gate_up, *self.down]


def _low_rank(products: Products, lora: Factors | None, x: Inputs, keep: Tensor | None) -> Tensor | None:
    return None if lora is None else products.low_rank(lora, _drop(x, keep))


def _drop(x: Inputs, keep: Tensor | None) -> Inputs:
    return x if keep is None else Inputs(x.rows() * keep)
