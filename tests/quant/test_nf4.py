"""NF4 against bitsandbytes itself: the same bits out, the same values back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import ModelError
from finetune.quant import native, nf4
from finetune.quant.native import bitsandbytes

library = bitsandbytes()
needs_bitsandbytes = pytest.mark.skipif(library is None, reason="bitsandbytes is not installed")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _uneven(rows: int) -> torch.Tensor:
    return _random(rows, 128) * torch.rand(rows, 1, generator=torch.Generator().manual_seed(1)) ** 8


TENSORS = {
    "weights": _random(256, 512) * 0.02,
    "three dimensions": _random(3, 5, 128),
    "uneven scales": _uneven(300),
    "zeros": torch.zeros(4, 128),
    "one value": torch.full((3, 128), -2.5),
    "tiny": _random(7, 128) * 1e-30,
    "subnormal": _random(9, 128) * 1e-39,
    "huge": _random(3, 128) * 1e37,
    "one weight in each block": torch.eye(128),
    "levels and middles": torch.tensor(
        [*nf4.LEVELS, *(torch.tensor(nf4.LEVELS).unfold(0, 2, 1).mean(1)), 0.0] * 4
    ).view(1, 128),
    "a partial block": _random(33, 6),
    "less than a block": _random(1, 10),
}


@needs_bitsandbytes
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TENSORS)
def test_the_bits_are_those_of_bitsandbytes(name, dtype, double):
    weight = TENSORS[name].to(dtype)
    for block in nf4.BLOCKS:
        theirs, state = library.functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=double, quant_type="nf4"
        )
        ours = nf4.quantize(weight, block=block, double=double)
        assert torch.equal(ours.codes, theirs.view(-1))
        assert torch.equal(ours.scales, state.absmax)
        if double:
            assert torch.equal(ours.scale_scales, state.state2.absmax)
            assert torch.equal(ours.offset, state.offset)
            assert torch.equal(nf4.scale_levels(torch.device("cpu")), state.state2.code)
        if weight.numel() % block == 0:  # of a partial block bitsandbytes reads scales beyond the end
            decoded = library.functional.dequantize_4bit(theirs, state)
            assert torch.equal(nf4.decode(ours, dtype), decoded.view(weight.shape))


@needs_bitsandbytes
def test_every_eight_bit_scale_is_rounded_as_bitsandbytes_does():
    steps = (torch.arange(2**16, dtype=torch.float64) / (2**16 - 1) * 2 - 1).float()
    near = steps + (torch.rand(2**16, generator=torch.Generator().manual_seed(0)) - 0.5) * 2**-15
    for values in (steps, near.clamp(-1, 1)):
        blocks = torch.ones(512, 256)
        blocks[:, 1:129] = values.view(512, 128)
        theirs, state = library.functional.quantize_blockwise(blocks, blocksize=256)
        ours, largest = nf4._quantize_scales(blocks.view(-1))
        assert torch.equal(ours, theirs.view(-1))
        assert torch.equal(largest, state.absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TENSORS)
def test_decoding_without_bitsandbytes_gives_level_times_scale_rounded_once(name, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "native_decode", lambda *_: None)
    for block in nf4.BLOCKS:
        packed = nf4.quantize(TENSORS[name], block=block)
        index = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[: TENSORS[name].numel()].long()
        scales = packed.float_scales().repeat_interleave(block)[: len(index)]
        expected = (torch.tensor(nf4.LEVELS)[index] * scales).to(dtype)
        assert torch.equal(nf4.decode(packed, dtype).view(-1), expected)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_decoders_agree(dtype, monkeypatch):
    packed = nf4.quantize(_uneven(1200))
    with_library = nf4.decode(packed, dtype)
    monkeypatch.setattr(nf4, "native_decode", lambda *_: None)
    assert torch.equal(nf4.decode(packed, dtype), with_library)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=200), st.booleans())
def test_every_weight_gets_its_nearest_level(values, double):
    weight = torch.tensor(values, dtype=torch.float32)
    packed = nf4.quantize(weight, double=False)
    index = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[: len(values)].long()
    scales = packed.scales.repeat_interleave(64)[: len(values)].double().clamp(min=1e-38)
    levels = torch.tensor(nf4.LEVELS, dtype=torch.float64)
    distance = (weight.double()[:, None] / scales[:, None] - levels).abs()
    chosen = distance.gather(1, index[:, None])[:, 0]
    assert bool((chosen <= distance.amin(1) + 1e-6).all())
    assert nf4.decode(nf4.quantize(weight, double=double), torch.float32).isfinite().all()


def test_the_weight_stays_as_it_is():
    weight = _uneven(40)
    before = weight.clone()
    nf4.quantize(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_weights_are_refused(value):
    weight = torch.ones(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        nf4.quantize(weight)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ModelError, match="is not a block size"):
        nf4.quantize(torch.ones(64), block=32)
    with pytest.raises(ModelError, match="is empty"):
        nf4.quantize(torch.ones(0, 64))


def test_where_bitsandbytes_is_missing_nothing_is_native(monkeypatch):
    monkeypatch.setattr(native, "bitsandbytes", lambda: None)
    assert native.native_decode("cpu", torch.bfloat16) is None
    assert native.native_decode("cpu", torch.float64) is None
