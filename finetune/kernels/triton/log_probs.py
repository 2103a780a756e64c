"""Rows of logits to log-probabilities of their targets and, in place, the gradient: the softmax of a loss."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Logits that a program holds at a time; with them in registers twice nothing spills."""
NUM_WARPS = 8


@triton.jit
def score_rows(
    logits_ptr, target_ptr, logp_ptr, right_ptr, stride, width, GRADIENT: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`logp = z[t] - log sum exp z`; right: no other z is larger, no earlier one equal; `z <- (v == t) - softmax(z)`.

    One program a row: the logits are read once for the sum and once more for the gradient, which replaces them.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptrs, target = logits_ptr + row * stride, tl.load(target_ptr + row)
    z_target = tl.load(z_ptrs + target).to(tl.float32)
    column_C = tl.arange(0, C)
    top = z_target  # above minus infinity from the start, and never above the true one
    sum_C = tl.zeros((C,), dtype=tl.float32)
    better_C = tl.zeros((C,), dtype=tl.int32)
    for start in range(0, width, C):
        ok_C = column_C < width - start
        z_C = tl.load(z_ptrs + start + column_C, mask=ok_C, other=float("-inf")).to(tl.float32)
        earlier_C = start + column_C < target
        better_C |= ((z_C > z_target) | ((z_C == z_target) & earlier_C)).to(tl.int32)
        old, top = top, tl.maximum(top, tl.max(z_C, axis=0))
        sum_C = sum_C * tl.exp(old - top) + tl.exp(z_C - top)
    log_sum = top + tl.log(tl.sum(sum_C, axis=0))
    tl.store(logp_ptr + row, z_target - log_sum)
    tl.store(right_ptr + row, (tl.max(better_C, axis=0) == 0).to(tl.uint8))
    if GRADIENT:
        for start in range(0, width, C):
            ok_C = column_C < width - start
            z_C = tl.load(z_ptrs + start + column_C, mask=ok_C, other=float("-inf")).to(tl.float32)
            d_C = tl.where(start + column_C == target, 1.0, 0.0) - tl.exp(z_C - log_sum)
            tl.store(z_ptrs + start + column_C, d_C.to(logits_ptr.dtype.element_ty), mask=ok_C)


def score_rows_(logits_nV: Tensor, target_n: Tensor, logp_n: Tensor, right_n: Tensor, *, gradient: bool) -> None:
    """Log-probabilities into `logp_n` (float32) and whether the target is the most likely into `right_n` (uint8).

    gradient: turn the logits into d logp / d logits.
    """
    rows, width = logits_nV.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    score_rows[(rows,)](
        logits_nV, target_n, logp_n, right_n, logits_nV.stride(0), width,
        GRADIENT=gradient, C=columns, num_warps=min(NUM_WARPS, max(1, columns // 256)),
    )  # fmt: skip
