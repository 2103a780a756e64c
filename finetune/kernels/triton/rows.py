"""Rows by expert from tokens, and tokens from rows: gather, and the weighted combine in the order of k."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton.sizes import cdiv, power_of_2

MAX_COLUMNS = 2048


@triton.jit
def gather_rows(x_ptr, index_ptr, out_ptr, stride_x, stride_out, width, C: tl.constexpr):
    """`out[n] = x[index[n]]`."""
    row, column_C = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    source = tl.load(index_ptr + row).to(tl.int64)
    values_C = tl.load(x_ptr + source * stride_x + column_C, mask=column_C < width)
    tl.store(out_ptr + row * stride_out + column_C, values_C, mask=column_C < width)


@triton.jit
def combine_rows(
    rows_ptr, row_ptr, weight_ptr, out_ptr, stride_rows, stride_out, width,
    K: tl.constexpr, HAS_WEIGHT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`out[t] = sum_k w[t, k] rows[row[t K + k]]`, summed in fp32 in the order of k; w = 1 without weights."""
    token, column_C = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    sum_C = tl.zeros((C,), dtype=tl.float32)
    for k in range(K):
        row = tl.load(row_ptr + token * K + k).to(tl.int64)
        values_C = tl.load(rows_ptr + row * stride_rows + column_C, mask=column_C < width, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            values_C *= tl.load(weight_ptr + token * K + k).to(tl.float32)
        sum_C += values_C
    tl.store(out_ptr + token * stride_out + column_C, sum_C.to(out_ptr.dtype.element_ty), mask=column_C < width)


def gather(x_TH: Tensor, token_P: Tensor, out_PH: Tensor) -> None:
    """`x_TH[token_P]` into `out_PH`, whose rows may be part of wider ones."""
    grid, columns = _grid(out_PH)
    gather_rows[grid](x_TH, token_P, out_PH, x_TH.stride(0), out_PH.stride(0), out_PH.shape[1], C=columns)


def combine(rows_PH: Tensor, row_P: Tensor, weights_TK: Tensor | None, out_TH: Tensor) -> None:
    """Weighted sum of the rows of each token into `out_TH`; the same bits every time."""
    num_k, (grid, columns) = row_P.shape[0] // out_TH.shape[0], _grid(out_TH)
    combine_rows[grid](
        rows_PH, row_P, weights_TK, out_TH, rows_PH.stride(0), out_TH.stride(0), out_TH.shape[1],
        K=num_k, HAS_WEIGHT=weights_TK is not None, C=columns,
    )  # fmt: skip


def _grid(out: Tensor) -> tuple[tuple[int, int], int]:
    """One program for each row and up to MAX_COLUMNS columns."""
    columns = min(MAX_COLUMNS, power_of_2(out.shape[1]))
    return (out.shape[0], cdiv(out.shape[1], columns)), columns
