"""Packed stacks decoded by Triton's kernels against the CPU's decoding: the same bits.

Not in bfloat16, to which Triton's interpreter does not round: see the compiled kernels, and tests/quant/test_on_gpu.py.
"""

import pytest
import torch

from finetune.kernels.triton import fp8, nf4
from finetune.models import fp8 as hub_fp8
from finetune.quant import nf4 as cpu_nf4

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
NF4_SHAPES = {
    "one value": (2, 1, 1),
    "odd": (3, 7, 13),
    "a byte over a block": (2, 1, 66),
    "half a block": (2, 1, 96),
    "one program": (2, 32, 128),
    "some and a bit": (3, 33, 190),
    "more than 256 blocks": (2, 130, 128),
}


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def nf4_stack(bank, *, block, double):
    packed = [cpu_nf4.quantize(expert, block=block, double=double) for expert in bank]

    def stacked(name):
        return None if getattr(packed[0], name) is None else torch.stack([getattr(p, name) for p in packed])

    names = ("codes", "scales", "scale_scales", "offset")
    return packed, nf4.Nf4(*(stacked(name) for name in names), block)


def levels():
    device = torch.device("cpu")
    return nf4.Levels(torch.tensor(cpu_nf4.LEVELS, dtype=torch.float32), cpu_nf4.scale_levels(device))


@DTYPES
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", NF4_SHAPES.values(), ids=NF4_SHAPES.keys())
def test_nf4_has_the_bits_of_the_cpu(shape, block, double, dtype):
    packed, stack = nf4_stack(normal(*shape), block=block, double=double)
    space = torch.full((shape[0] + 1, *shape[1:]), torch.nan, dtype=dtype)
    nf4.decode(stack, levels(), space[:-1])
    assert torch.equal(space[:-1], torch.stack([cpu_nf4.decode(expert, dtype) for expert in packed]))
    assert space[-1].isnan().all()


@pytest.mark.parametrize("block", [64, 128])
def test_nf4_into_rows_that_lie_apart(block):
    packed, stack = nf4_stack(normal(3, 35, 256), block=block, double=True)
    blocks = torch.full((3, 40, 272), torch.nan)
    out = blocks[:, :35, :256]
    assert nf4.can_decode_to(out, block)
    nf4.decode(stack, levels(), out)
    assert torch.equal(out, torch.stack([cpu_nf4.decode(expert, torch.float32) for expert in packed]))
    assert blocks.isnan().sum() == blocks.numel() - out.numel()
    assert not nf4.can_decode_to(blocks[:, :35, :96], 128)
    assert not nf4.can_decode_to(blocks[:, :35, :256:2], 64)


FP8_SHAPES = {
    "one value": ((2, 1, 1), 1),
    "odd": ((3, 7, 13), 1),
    "two matrices in one block": ((2, 30, 20), 2),
    "whole blocks": ((2, 256, 256), 2),
    "cut blocks, two matrices": ((2, 2 * 130, 131), 2),
    "a column over": ((1, 40, 129), 1),
}


def fp8_stack(bank, matrices, block):
    codes, scales, decoded = [], [], []
    for expert in bank:
        pairs = [hub_fp8.quantize(matrix, (block, block), torch.float32) for matrix in expert.chunk(matrices)]
        codes.append(torch.cat([values.reshape(-1).view(torch.uint8) for values, _ in pairs]))
        scales.append(torch.cat([scale.reshape(-1) for _, scale in pairs]))
        decoded.append(torch.cat([hub_fp8.dequantize(*pair, (block, block)) for pair in pairs]))
    return fp8.Fp8(torch.stack(codes), torch.stack(scales), matrices, block), torch.stack(decoded)


@DTYPES
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("shape", "matrices"), FP8_SHAPES.values(), ids=FP8_SHAPES.keys())
def test_fp8_has_the_bits_of_the_cpu(shape, matrices, block, dtype):
    stack, want = fp8_stack(normal(*shape), matrices, block)
    space = torch.full((shape[0] + 1, *shape[1:]), torch.nan, dtype=dtype)
    fp8.decode(stack, space[:-1])
    assert torch.equal(space[:-1], want.to(dtype))
    assert space[-1].isnan().all()
    blocks = torch.full((shape[0], shape[1] + 2, shape[2] + 3), torch.nan, dtype=dtype)
    fp8.decode(stack, blocks[:, : shape[1], : shape[2]])
    assert torch.equal(blocks[:, : shape[1], : shape[2]], want.to(dtype))
    assert blocks.isnan().sum() == blocks.numel() - want.numel()


def test_every_fp8_value():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    out = torch.empty(1, 2, 128)
    fp8.decode(fp8.Fp8(codes, torch.tensor([[0.5]]), 1, 128), out)
    want = codes.view(torch.float8_e4m3fn).float().view(1, 2, 128) * 0.5
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert int(out.isnan().sum()) == 2


def test_experts_without_rows_are_left_out():
    end_E = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    bank = normal(4, 6, 32)
    packed, stack = nf4_stack(bank, block=64, double=True)
    out = torch.full(bank.shape, torch.nan)
    nf4.decode(stack, levels(), out, end_E)
    stack_fp8, want_fp8 = fp8_stack(bank, 1, 128)
    out_fp8 = torch.full(bank.shape, torch.nan)
    fp8.decode(stack_fp8, out_fp8, end_E)
    for expert, reached in enumerate((False, True, False, True)):
        if reached:
            assert torch.equal(out[expert], cpu_nf4.decode(packed[expert], torch.float32))
            assert torch.equal(out_fp8[expert], want_fp8[expert])
        else:
            assert out[expert].isnan().all()
            assert out_fp8[expert].isnan().all()
