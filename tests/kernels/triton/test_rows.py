"""Gather, combine and SwiGLU row by row, against their plain references, into rows that are parts of wider ones."""

import pytest
import torch

from finetune.kernels.blocks import rounded_rank
from finetune.kernels.device_path import SwigluGradients
from finetune.kernels.grouped import TorchRowWork
from finetune.kernels.layer import Factors
from finetune.kernels.sorted_rows import sort_rows
from finetune.kernels.triton import rows, swiglu
from finetune.kernels.triton.row_work import TritonRowWork
from tests.kernels.triton import plain
from tests.kernels.triton.test_routing import random_index

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def part_of_wider(height, width, dtype, padding=3):
    wide = torch.full((height, width + padding), torch.nan, dtype=dtype)
    return wide, wide[:, :width]


def assert_same(got, want):
    assert got.isfinite().all()
    torch.testing.assert_close(got, want)


@DTYPES
@pytest.mark.parametrize("width", [1, 24, 2100])
def test_gather(width, dtype):
    x, index = normal(5, width, dtype=dtype), torch.tensor([4, 0, 0, 3, 2, 1, 4], dtype=torch.int32)
    wide, out = part_of_wider(7, width, dtype)
    rows.gather(x, index, out)
    assert torch.equal(out, x[index.long()])
    assert wide[:, width:].isnan().all()


@DTYPES
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("width", [1, 24, 2100])
def test_combine(width, weighted, dtype):
    row_P = sort_rows(random_index(5, 6, 3), 6).row_P
    weights = normal(5, 3, seed=1) if weighted else None
    got, want = torch.full((2, 5, width), torch.nan, dtype=dtype)
    values = normal(15, width, dtype=dtype)
    rows.combine(values, row_P, weights, got)
    plain.combine(values, row_P, weights, want)
    assert_same(got, want)


@DTYPES
@pytest.mark.parametrize("width", [1, 24, 1100])
def test_swiglu(width, dtype):
    gate_up = normal(6, 2 * width, dtype=dtype)
    wide, h = part_of_wider(6, width, dtype)
    swiglu.forward(gate_up, h)
    gate, up = gate_up.float().chunk(2, dim=1)
    assert_same(h, (torch.nn.functional.silu(gate) * up).to(dtype))
    assert wide[:, width:].isnan().all()


@DTYPES
@pytest.mark.parametrize("width", [1, 24, 1100])
def test_swiglu_back(width, dtype):
    gate_up, d_h, weights = (
        normal(6, 2 * width, dtype=dtype),
        normal(6, width, dtype=dtype, seed=1),
        normal(3, 2, seed=2),
    )
    pair_P = torch.tensor([3, 1, 5, 0, 2, 4], dtype=torch.int32)

    def gradients():
        out = part_of_wider(6, 2 * width, dtype)[1], part_of_wider(6, width, dtype)[1]
        return SwigluGradients(*out, torch.full((6,), torch.nan))

    got, want = gradients(), gradients()
    swiglu.backward(gate_up, d_h, weights, pair_P, got)
    plain.swiglu_backward(gate_up, d_h, weights, pair_P, want)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)
    gate_up, weights = gate_up.float().requires_grad_(), weights.requires_grad_()
    gate, up = gate_up.chunk(2, dim=1)
    weighted = torch.nn.functional.silu(gate) * up * weights.reshape(-1)[pair_P.long(), None]
    d_gate_up, d_weights = torch.autograd.grad(weighted, [gate_up, weights], d_h.float())
    tolerance = {"rtol": 3e-3, "atol": 3e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(got.gate_up_PG.float(), d_gate_up, **tolerance)
    torch.testing.assert_close(got.weight_P, d_weights.reshape(-1))


@DTYPES
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_borders(rank, dtype):
    slot_E = torch.tensor([1, -1, 0, 2])
    lora = Factors(normal(3, rank, 140), normal(3, 24, rank, seed=1), 0.7, slot_E)
    rounded = rounded_rank(rank)

    def padding():
        blocks = torch.full((4, 24 + rounded, 140 + rounded), torch.nan, dtype=dtype)
        return blocks, blocks[:, 24:, :140], blocks[:, :24, 140:]

    (got, *parts), (want, *want_parts) = padding(), padding()
    TritonRowWork().write_lora_padding(lora, *parts)
    TorchRowWork().write_lora_padding(lora, *want_parts)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert not parts[0][1].any()
    assert not parts[0][:, rank:].any()
