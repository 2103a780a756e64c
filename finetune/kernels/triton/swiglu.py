"""SwiGLU of [gate; up] rows and its gradient, with the routing weight and the weight's own gradient folded in."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.device_path import SwigluGradients
from finetune.kernels.triton.sizes import cdiv, power_of_2


@triton.jit
def swiglu_parts(gate, up):
    """`silu(g)`, `silu'(g)` and `h = silu(g) u`, in fp32."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid * (1.0 + gate * (1.0 - sigmoid)), silu * up


@triton.jit
def swiglu_rows(gate_up_ptr, h_ptr, stride_gate_up, stride_h, width, C: tl.constexpr):
    """`h = silu(gate) up`."""
    row, column_C = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    gate_ptrs, ok_C = gate_up_ptr + row * stride_gate_up + column_C, column_C < width
    gate_C = tl.load(gate_ptrs, mask=ok_C, other=0.0).to(tl.float32)
    up_C = tl.load(gate_ptrs + width, mask=ok_C, other=0.0).to(tl.float32)
    _, _, h_C = swiglu_parts(gate_C, up_C)
    tl.store(h_ptr + row * stride_h + column_C, h_C.to(h_ptr.dtype.element_ty), mask=ok_C)


@triton.jit
def swiglu_back_rows(
    gate_up_ptr, d_h_ptr, weight_ptr, pair_ptr, d_gate_up_ptr, weighted_h_ptr, d_weight_ptr,
    stride_gate_up, stride_d_h, stride_d_gate_up, stride_weighted_h, width, C: tl.constexpr,
):  # fmt: skip
    """`d gate = w dh up silu'(gate)`, `d up = w dh silu(gate)`, `wh = w silu(gate) up`, `dw = <h, dh>`."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(pair_ptr + row)
    weight = tl.load(weight_ptr + pair).to(tl.float32)
    d_weight_C = tl.zeros((C,), dtype=tl.float32)
    for start in range(0, width, C):
        column_C = start + tl.arange(0, C)
        ok_C = column_C < width
        gate_ptrs = gate_up_ptr + row * stride_gate_up + column_C
        gate_C = tl.load(gate_ptrs, mask=ok_C, other=0.0).to(tl.float32)
        up_C = tl.load(gate_ptrs + width, mask=ok_C, other=0.0).to(tl.float32)
        d_h_C = tl.load(d_h_ptr + row * stride_d_h + column_C, mask=ok_C, other=0.0).to(tl.float32)
        silu_C, slope_C, h_C = swiglu_parts(gate_C, up_C)
        d_weight_C += h_C * d_h_C
        d_h_C *= weight
        d_gate_ptrs = d_gate_up_ptr + row * stride_d_gate_up + column_C
        tl.store(d_gate_ptrs, (d_h_C * up_C * slope_C).to(d_gate_up_ptr.dtype.element_ty), mask=ok_C)
        tl.store(d_gate_ptrs + width, (d_h_C * silu_C).to(d_gate_up_ptr.dtype.element_ty), mask=ok_C)
        weighted_h_ptrs = weighted_h_ptr + row * stride_weighted_h + column_C
        tl.store(weighted_h_ptrs, (h_C * weight).to(weighted_h_ptr.dtype.element_ty), mask=ok_C)
    tl.store(d_weight_ptr + pair, tl.sum(d_weight_C, axis=0))


def forward(gate_up_PG: Tensor, h_PI: Tensor) -> None:
    """H into `h_PI`."""
    num_rows, width = h_PI.shape
    columns = min(1024, power_of_2(width))
    grid = (num_rows, cdiv(width, columns))
    swiglu_rows[grid](gate_up_PG, h_PI, gate_up_PG.stride(0), h_PI.stride(0), width, C=columns)


def backward(gate_up_PG: Tensor, d_h_PI: Tensor, weights_TK: Tensor, pair_P: Tensor, into: SwigluGradients) -> None:
    """All three gradients in one pass over the rows. d_h_PI: gradient of h before the routing weight."""
    num_rows, width = d_h_PI.shape
    swiglu_back_rows[(num_rows,)](
        gate_up_PG, d_h_PI, weights_TK, pair_P, *into,
        gate_up_PG.stride(0), d_h_PI.stride(0), into.gate_up_PG.stride(0), into.weighted_h_PI.stride(0),
        width, C=min(1024, power_of_2(width)),
    )  # fmt: skip
