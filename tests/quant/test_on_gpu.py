"""What only a GPU can show of packed weights: the CPU's bits in every type, without waiting for the host."""

import pytest
import torch

from finetune.kernels.support import decodes_on
from finetune.quant import nf4
from tests.quant.packed import SCHEMES, decoded, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def bank(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@DTYPES
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 14, 13), (4, 2 * 96, 160), (5, 1536, 2048)])
def test_a_stack_decodes_to_the_bits_of_the_cpu(shape, scheme, dtype):
    stack = pack(bank(*shape), scheme, matrices=2)
    want = decoded(stack, dtype)
    stack = stack.to("cuda")
    assert decodes_on(stack.device, dtype)
    assert torch.equal(stack.all_weights(dtype).cpu(), want)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack.all_weights(dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
def test_a_single_weight_decodes_to_the_bits_of_the_cpu(dtype):
    packed = nf4.quantize(bank(96, 160))
    want = nf4.decode(packed, dtype)
    fields = {name: getattr(packed, name).cuda() for name in ("codes", "scales", "scale_scales", "offset")}
    there = nf4.Packed(**fields, shape=packed.shape, block=packed.block)
    assert torch.equal(nf4.decode(there, dtype).cpu(), want)
