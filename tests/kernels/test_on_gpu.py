"""What only a GPU can show: all products right in bfloat16, no wait for the host, CUDA graphs, torch.compile."""

import pytest
import torch

from benchmarks.gpu import check
from benchmarks.gpu.layers import Case, Shape, step
from finetune.kernels.ops import expert_mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [Shape(), Shape(experts=6, hidden=512, intermediate=256, top_k=2), Shape(60, 1024, 1024, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_set_of_products(shape):
    assert check.faults(shape, ["triton", "hybrid", "grouped"], torch.device("cuda")) == []


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_compiled_by_inductor(backend):
    case = Case(Shape(experts=6, hidden=512, intermediate=256, top_k=2), 100, torch.device("cuda"))
    layer = case.layer(case.banks)
    loras = {"gate_up_lora": layer.gate_up_lora, "down_lora": layer.down_lora}

    def forward():
        return expert_mlp(case.x, case.index, case.weights, *case.banks, **loras, backend=backend)

    step(case, forward)
    want = [leaf.grad for leaf in case.leaves]
    step(case, torch.compile(forward, fullgraph=True))
    for leaf, grad in zip(case.leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
