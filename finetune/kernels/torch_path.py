"""The expert MLP with LoRA as one autograd function on torch's own products, for CPU and any device.

Saved for backward: x (not its permuted copy), the gate_up output (not with `recompute`), indices and weights. The
down output is never saved: the gradient of a routing weight is <h, dh> before dh is weighted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from finetune.errors import Problem, TrainingError
from finetune.kernels.arrangement import Arrangement, Pass
from finetune.kernels.layer import ExpertLayer, Factors
from finetune.kernels.projection import FactorGrads, Projection
from finetune.kernels.swiglu import swiglu, swiglu_back
from finetune.kernels.token_blocks import Block


def expert_mlp(
    x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, layer: ExpertLayer, recompute: bool
) -> Tensor:
    """The expert MLP, (T, H); arguments as in `ops.expert_mlp`."""
    gate_up, down = layer.gate_up_lora, layer.down_lora
    tensors = Inputs(
        x_TH,
        top_k_weights_TK,
        gate_up.a_XRI if gate_up else None,
        gate_up.b_XOR if gate_up else None,
        down.a_XRI if down else None,
        down.b_XOR if down else None,
        layer.gate_up_delta.delta_XOI if layer.gate_up_delta else None,
        layer.down_delta.delta_XOI if layer.down_delta else None,
    )
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out: Tensor = _ExpertMLP.apply(*tensors, Arrangement.of(top_k_index_TK, layer), needs_grad and not recompute)
    return out


class Inputs(NamedTuple):
    """One value for each differentiable input: the tensor, whether it needs a gradient, or its gradient."""

    x_TH: Any
    weights_TK: Any
    gate_up_a_XRI: Any
    gate_up_b_XOR: Any
    down_a_XRI: Any
    down_b_XOR: Any
    gate_up_delta_XOI: Any
    down_delta_XOI: Any


class _ExpertMLP(torch.autograd.Function):
    """Inputs: Inputs, the arrangement, and whether to keep the gate_up output for backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensors, (arrangement, keep_gate_up) = Inputs(*inputs[:-2]), inputs[-2:]
        with torch.autocast(tensors.x_TH.device.type, enabled=False):
            out_TH, gate_up_NG = forward(tensors, arrangement, keep_gate_up)
        ctx.arrangement = arrangement
        ctx.save_for_backward(*tensors, gate_up_NG)
        return out_TH

    @staticmethod
    def backward(ctx: Any, d_out_TH: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph: a second derivative would silently lack what flows through here
            hint = "call backward without create_graph, or use the reference backend"
            raise TrainingError(Problem("expert MLP", "is differentiable once only", hint))
        *tensors, gate_up_NG = ctx.saved_tensors
        needs = Inputs(*ctx.needs_input_grad[:-2])
        with torch.autocast(d_out_TH.device.type, enabled=False):
            grads = backward(ctx.arrangement, Inputs(*tensors), gate_up_NG, needs, d_out_TH)
        return (*grads, None, None)


def forward(tensors: Inputs, arrangement: Arrangement, keep_gate_up: bool) -> tuple[Tensor, Tensor | None]:
    """The output and, if kept, the gate_up output of every row, (N, G)."""
    this_pass, num_rows = Pass(arrangement), len(arrangement.rows.pair_N)
    x_TH = arrangement.with_padding(tensors.x_TH.to(arrangement.dtype))
    gate_up_NG = x_TH.new_empty(num_rows, arrangement.layer.gate_up_EGH.shape[1]) if keep_gate_up else None
    y_NH = x_TH.new_empty(num_rows, x_TH.shape[1])
    for block in arrangement.rows.blocks:
        here = slice(block.start, block.stop)
        x_NH = x_TH.index_select(0, arrangement.tokens_of(block))
        out_NG = _gate_up(this_pass, block, x_NH, None if gate_up_NG is None else gate_up_NG[here])
        h_NI, _ = swiglu(out_NG)
        z = this_pass.down.through_a(block, _drop(h_NI, this_pass.keep_h(block)))
        this_pass.down.project_(block, y_NH[here], h_NI, z)
    out_TH = _sum_over_experts(y_NH, arrangement, tensors.weights_TK.to(arrangement.dtype))
    return out_TH.to(tensors.x_TH.dtype), gate_up_NG


def backward(
    arrangement: Arrangement,
    tensors: Inputs,
    gate_up_NG: Tensor | None,
    needs: Inputs,
    d_out_TH: Tensor,
) -> Inputs:
    """The gradients that are needed, given the gate_up output of every row or None to compute it again."""
    return _Backward(arrangement, tensors, gate_up_NG, needs).run(d_out_TH)


def _gate_up(this_pass: Pass, block: Block, x_NH: Tensor | None, out_NG: Tensor | None) -> Tensor:
    """[gate; up] of a block's rows, written to `out_NG` if that is given."""
    assert x_NH is not None
    if out_NG is None:
        out_NG = x_NH.new_empty(len(x_NH), this_pass.width_of_gate_up)
    z = this_pass.gate_up.through_a(block, _drop(x_NH, this_pass.keep_x(block)))
    this_pass.gate_up.project_(block, out_NG, x_NH, z)
    return out_NG


class _Way(NamedTuple):
    """A projection on the way back: where its factors' gradients go (None for nowhere), and what dropout kept.

    delta_grad_XOI: where the gradients of whole experts go, None for nowhere.
    """

    projection: Projection
    grads: FactorGrads | None
    keep: Tensor | None
    delta_grad_XOI: Tensor | None


class _Backward:
    """Gradients of the inputs that need one, gathered block by block."""

    def __init__(
        self,
        arrangement: Arrangement,
        tensors: Inputs,
        gate_up_NG: Tensor | None,
        needs: Inputs,
    ) -> None:
        self._arrangement, self._tensors, self._gate_up_NG = arrangement, tensors, gate_up_NG
        self._pass = Pass(arrangement)
        self._x_TH = arrangement.with_padding(tensors.x_TH.to(arrangement.dtype))
        self._weight_N1 = arrangement.weights_of_rows(tensors.weights_TK)
        num_rows = len(self._weight_N1)
        self._d_x_NH = self._x_TH.new_empty(num_rows, self._x_TH.shape[1]) if needs.x_TH else None
        self._d_weight_N = self._x_TH.new_empty(num_rows) if needs.weights_TK else None
        layer = arrangement.layer
        self._d_gate_up = self._grads(layer.gate_up_lora) if layer.gate_up_lora and any(needs[2:4]) else None
        self._d_down = self._grads(layer.down_lora) if layer.down_lora and any(needs[4:6]) else None
        deltas = (layer.gate_up_delta, needs.gate_up_delta_XOI), (layer.down_delta, needs.down_delta_XOI)
        self._d_gate_up_delta, self._d_down_delta = (
            self._room(delta.slot_of_expert, delta.delta_XOI)[0] if delta and needed else None
            for delta, needed in deltas
        )
        trained = (self._d_x_NH, self._d_gate_up, self._d_gate_up_delta)
        self._needs_gate_up = any(gradient is not None for gradient in trained)

    def _grads(self, lora: Factors) -> FactorGrads:
        """Memory for the gradients of a projection's factors."""
        return FactorGrads(*self._room(lora.slot_of_expert, lora.a_XRI, lora.b_XOR))

    def _room(self, slot_of_expert: Tensor, *weights: Tensor) -> list[Tensor]:
        """Memory for the gradients of weights in slots, zero in the slots that no row reaches."""
        grads = [torch.empty_like(weight) for weight in weights]
        reached = {expert for block in self._arrangement.rows.blocks for expert in block.experts}
        unreached = [slot for e, slot in enumerate(slot_of_expert.tolist()) if slot >= 0 and e not in reached]
        if unreached:
            index = torch.tensor(unreached, device=weights[0].device)
            for grad in grads:
                grad.index_fill_(0, index, 0)
        return grads

    def run(self, d_out_TH: Tensor) -> Inputs:
        """The gradients, in the types of the inputs."""
        d_out_TH = self._arrangement.with_padding(d_out_TH.to(self._arrangement.dtype))
        for block in self._arrangement.rows.blocks:
            self._block(block, d_out_TH)
        tensors, d_x_TH, d_weights_TK = self._tensors, None, None
        if self._d_x_NH is not None:
            d_x_TH = _sum_over_experts(self._d_x_NH, self._arrangement, None).to(tensors.x_TH.dtype)
        if self._d_weight_N is not None:
            d_weight_P = self._d_weight_N.index_select(0, self._arrangement.rows.row_P)
            d_weights_TK = d_weight_P.view(tensors.weights_TK.shape).to(tensors.weights_TK.dtype)
        gate_up, down = self._d_gate_up or (None, None), self._d_down or (None, None)
        return Inputs(
            d_x_TH, d_weights_TK, gate_up[0], gate_up[1], down[0], down[1], self._d_gate_up_delta, self._d_down_delta
        )

    def _block(self, block: Block, d_out_TH: Tensor) -> None:
        here, token_N, saved = slice(block.start, block.stop), self._arrangement.tokens_of(block), self._gate_up_NG
        reads_x = saved is None or self._d_gate_up is not None or self._d_gate_up_delta is not None
        x_NH = self._x_TH.index_select(0, token_N) if reads_x else None
        gate_up_NG = _gate_up(self._pass, block, x_NH, None) if saved is None else saved[here]
        h_NI, silu_NI = swiglu(gate_up_NG)
        weight_N1, d_y_NH = self._weight_N1[here], d_out_TH.index_select(0, token_N)
        needs_h = self._needs_gate_up or self._d_weight_N is not None
        d_h_NI = torch.empty_like(h_NI) if needs_h else None
        down = _Way(self._pass.down, self._d_down, self._pass.keep_h(block), self._d_down_delta)
        _back_(down, block, h_NI, d_y_NH, d_h_NI, weight_N1)
        if d_h_NI is not None and self._d_weight_N is not None:
            self._d_weight_N[here] = (h_NI * d_h_NI).sum(-1)
        if d_h_NI is not None and self._needs_gate_up:
            d_gate_up_NG = swiglu_back(gate_up_NG, silu_NI, d_h_NI.mul_(weight_N1))
            gate_up = _Way(self._pass.gate_up, self._d_gate_up, self._pass.keep_x(block), self._d_gate_up_delta)
            _back_(gate_up, block, x_NH, d_gate_up_NG, None if self._d_x_NH is None else self._d_x_NH[here], None)


def _back_(
    way: _Way, block: Block, x_NI: Tensor | None, d_y_NO: Tensor, d_x_NI: Tensor | None, weight_N1: Tensor | None
) -> None:
    """Through one projection: into `d_x_NI` if given, and into `way.grads` and `way.delta_grad_XOI` if given.

    weight_N1: by which `d_y_NO` has still to be multiplied for the factors' gradients; None for 1.
    """
    projection = way.projection
    if way.delta_grad_XOI is not None:
        assert x_NI is not None
        weighted_NI = x_NI if weight_N1 is None else x_NI * weight_N1
        projection.delta_grads_(block, way.delta_grad_XOI, weighted_NI, d_y_NO)
    dz = projection.through_b(block, d_y_NO)
    if way.grads is not None and dz is not None:
        assert x_NI is not None
        x_lora_NI = _drop(x_NI, way.keep)
        z = projection.through_a(block, x_lora_NI)
        assert z is not None
        dz_scaled, z_scaled = (projection.scaled(thin, block, weight_N1) for thin in (dz, z))
        projection.factor_grads_(block, way.grads, (dz_scaled, x_lora_NI), (z_scaled, d_y_NO))
    if d_x_NI is not None:
        projection.project_back_(block, d_x_NI, d_y_NO, dz, way.keep)


def _drop(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows * keep


def _sum_over_experts(rows_NH: Tensor, arrangement: Arrangement, weights_TK: Tensor | None) -> Tensor:
    """`sum_k w_tk rows[row of pair (t, k)]`, (T, H): a gather and a sum in the order of k, so always the same bits."""
    row_TK = arrangement.rows.row_P.view(arrangement.num_tokens, arrangement.num_k)
    if arrangement.num_tokens == 0:
        return rows_NH.new_zeros(0, rows_NH.shape[1])
    return embedding_bag(row_TK, rows_NH, per_sample_weights=weights_TK, mode="sum")
