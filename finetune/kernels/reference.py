"""The expert MLP with LoRA written to be read: a loop over experts under plain autograd, exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from finetune.kernels.layer import Deltas, ExpertLayer, Factors, Stack, weights_of


def expert_mlp(x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, layer: ExpertLayer) -> Tensor:
    """`y_t = sum_k w_tk down_e(silu(gate_e(x_t)) * up_e(x_t))`, (T, H); each projection is W_e + scale * B_e A_e."""
    dtype = layer.compute_dtype()
    num_tokens, num_k = top_k_index_TK.shape
    intermediate = layer.down_EHI.shape[-1]
    with torch.autocast(x_TH.device.type, enabled=False):
        x, weights_TK = x_TH.to(dtype), top_k_weights_TK.to(dtype)
        x_lora, keep_PI = x, None
        if layer.dropout is not None:
            gain = layer.dropout.gain
            x_lora = x * layer.dropout.token_mask(num_tokens, x.shape[1], x.device).to(dtype) * gain
            keep_PI = layer.dropout.pair_mask(num_tokens * num_k, intermediate, x.device).to(dtype) * gain
        out_TH = x.new_zeros(x.shape) + _no_gradient_is_zero(layer).to(dtype)
        for expert in range(layer.num_experts):
            token, k = torch.where(top_k_index_TK == expert)
            gate_up_GH = _weight(layer.gate_up_EGH, layer.gate_up_delta, expert, dtype)
            gate, up = _project(x[token], x_lora[token], expert, gate_up_GH, layer.gate_up_lora).chunk(2, dim=-1)
            h = silu(gate) * up
            h_lora = h if keep_PI is None else h * keep_PI[token * num_k + k]
            down_HI = _weight(layer.down_EHI, layer.down_delta, expert, dtype)
            y = _project(h, h_lora, expert, down_HI, layer.down_lora)
            out_TH = out_TH.index_add(0, token, y * weights_TK[token, k, None])
        return out_TH.to(x_TH.dtype)


def _weight(weight_EOI: Stack, delta: Deltas | None, expert: int, dtype: torch.dtype) -> Tensor:
    """`W_e + scale delta`, (out, in)."""
    slot = -1 if delta is None else int(delta.slot_of_expert[expert])
    if delta is None or slot < 0:
        return weights_of(weight_EOI, (expert,), dtype)[0]
    delta_OI = delta.delta_XOI[slot]
    return (weights_of(weight_EOI, (expert,), delta_OI.dtype)[0] + delta.scale * delta_OI).to(dtype)


def _project(x: Tensor, x_lora: Tensor, expert: int, weight_OI: Tensor, lora: Factors | None) -> Tensor:
    """`x W_e^T + scale (x_lora A^T) B^T`."""
    y = linear(x, weight_OI)
    slot = -1 if lora is None else int(lora.slot_of_expert[expert])
    if lora is None or slot < 0:
        return y
    return y + lora.scale * linear(linear(x_lora, lora.a_XRI[slot].to(x.dtype)), lora.b_XOR[slot].to(x.dtype))


def _no_gradient_is_zero(layer: ExpertLayer) -> Tensor:
    """Zero that depends on all that trains, so that slots no token reaches get zeros instead of None as gradients."""
    zero = torch.zeros((), dtype=layer.gate_up_EGH.dtype, device=layer.gate_up_EGH.device)
    for lora in (layer.gate_up_lora, layer.down_lora):
        if lora is not None:
            zero = zero + lora.a_XRI.flatten()[:0].sum() + lora.b_XOR.flatten()[:0].sum()
    for delta in (layer.gate_up_delta, layer.down_delta):
        if delta is not None:
            zero = zero + delta.delta_XOI.flatten()[:0].sum()
    return zero
