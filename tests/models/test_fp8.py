import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import ModelError
from finetune.models import fp8


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), rows=st.integers(1, 9), columns=st.integers(1, 9),
    exponent=st.integers(-20, 20), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_value_is_within_half_a_step(height, width, rows, columns, exponent, seed):
    weight = torch.randn(height, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values, scales = fp8.quantize(weight, (rows, columns), torch.float32)
    assert scales.shape == fp8.scales_shape(weight.shape, (rows, columns))
    back = fp8.dequantize(values, scales, (rows, columns))
    per_value = scales.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
    # half a unit of three mantissa bits, or half the smallest step
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, per_value * 2**-10) * 1.001).all()
    for first in range(0, height, max(1, height // 3)):
        assert torch.equal(fp8.dequantize(values[first:], scales, (rows, columns), first), back[first:])


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        "fp8",
    ],
)
def test_other_quantization_is_refused(settings):
    with pytest.raises(ModelError, match="quantized"):
        fp8.block_of({"quantization_config": settings}, "config.json")


def test_no_quantization():
    assert fp8.block_of({}, "config.json") is None
    assert fp8.block_of({"quantization_config": None}, "config.json") is None
