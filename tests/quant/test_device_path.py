"""The device path on packed stacks: what it computes on the decoded weights, and nothing decoded outlives a pass.

Triton's kernels run in its interpreter here, torch's grouped products on CPU.
"""

import copy
import gc
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is made for Linux only")

from finetune.kernels import device_op, layer
from finetune.kernels.blocks import pad_bank_
from finetune.kernels.layer import Dropout, ExpertLayer
from finetune.kernels.ops import expert_mlp
from finetune.quant import experts, nf4
from tests.kernels.problems import make, output_gradient
from tests.kernels.triton import interpreted  # noqa: F401
from tests.quant.packed import SCHEMES, decoded, pack

PRODUCTS = ("triton", "grouped", "hybrid")


def small(dtype=torch.float32, **shape):
    """A problem whose widths grouped products take too, multiples of 8, and no whole number of scale blocks."""
    shape = {"tokens": 9, "hidden": 24, "intermediate": 8, **shape}
    return make(**shape, dtype=dtype, factor_dtype=torch.float32)


def packed(problem, scheme):
    """Both stacks of a problem, packed."""
    return pack(problem.gate_up, scheme, matrices=2), pack(problem.down, scheme)


def run(problem, stacks, products, recompute=False):
    call = ExpertLayer(*stacks, problem.gate_up_lora, problem.down_lora, problem.dropout)
    return device_op.expert_mlp(problem.x, problem.index, problem.weights, call, recompute, products)


def stack_in_blocks(stack, dtype):
    """The weights, decoded into the upper left of larger matrices; what is around them stays."""
    num_experts, height, width = stack.shape
    blocks = torch.full((num_experts, height + 3, width + 5), torch.nan, dtype=dtype)
    weights = blocks[:, :height, :width]
    stack.decode_(weights)
    assert blocks.isnan().sum() == blocks.numel() - weights.numel()
    return weights


def plain(stacks, problem, products, dtype=None):
    """The decoded weights of packed stacks, with padding where the products make some."""
    banks = [nn.Parameter(decoded(stack, dtype), requires_grad=False) for stack in stacks]
    for bank, lora in zip(banks, (problem.gate_up_lora, problem.down_lora), strict=True):
        if products != "triton" and lora is not None:
            pad_bank_(bank, lora.a_XRI.shape[1])
    return banks


def with_gradients(problem, out):
    return [out.detach(), *torch.autograd.grad(out, problem.leaves, output_gradient(out))]


SHAPES = {
    "plain": {},
    "some experts frozen": {"slots": (5, 0, 2), "tokens": 4},
    "no factors": {"targets": ()},
    "no token": {"tokens": 0},
    "dropout": {"dropout": Dropout(0.4, 5), "slots": (0, 1, 4, 5)},
    "half precision": {"dtype": torch.float16},
}
CASES = [
    *(("grouped", scheme, shape) for scheme in SCHEMES for shape in SHAPES),
    *((products, scheme, "some experts frozen") for products in ("triton", "hybrid") for scheme in ("nf4", "fp8")),
]


@pytest.mark.parametrize(("products", "scheme", "shape"), CASES)
def test_outputs_and_gradients_are_those_of_the_decoded_weights(products, scheme, shape):
    problem = small(**SHAPES[shape])
    stacks = packed(problem, scheme)
    banks = plain(stacks, problem, products)
    got, want = (with_gradients(problem, run(problem, these, products)) for these in (stacks, banks))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    reference = replace(problem, gate_up=banks[0], down=banks[1]).with_gradients("reference")
    tolerance = 1e-5 if problem.x.dtype == torch.float32 else 4e-3
    for a, b in zip(got, reference, strict=True):
        assert (a - b).norm() <= tolerance * max(1.0, float(b.norm()))


@pytest.fixture
def decoding_by_triton(monkeypatch):
    for module in (experts, nf4):
        monkeypatch.setattr(module, "decodes_on", lambda device, dtype: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_triton_decodes_the_same_bits(scheme, dtype, request):
    stack = pack(make(hidden=70, intermediate=33).gate_up.to(dtype), scheme, matrices=2)
    want = decoded(stack)
    request.getfixturevalue("decoding_by_triton")
    assert torch.equal(layer.all_weights(stack, dtype), want)
    assert torch.equal(stack_in_blocks(stack, dtype), want)
    if scheme != "fp8":
        assert torch.equal(stack.weights_of((3, 1), dtype), want[[3, 1]])


@pytest.mark.parametrize("products", ["triton", "grouped"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_without_rows_are_not_decoded(scheme, products, request):
    problem = small(tokens=3, index=torch.tensor([[4, 1], [1, 4], [4, 1]]))
    stacks = packed(problem, scheme)
    want = with_gradients(problem, run(problem, plain(stacks, problem, products), products))
    request.getfixturevalue("decoding_by_triton")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fills what empty() returns with NaN
    try:
        got = with_gradients(problem, run(problem, stacks, products))
        left_out = layer.all_weights(stacks[0], torch.float32, torch.tensor([0, 2, 2, 2, 5, 5], dtype=torch.int32))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert left_out.isnan().all(2).all(1).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_without_rows_are_not_read_from_disk(scheme):
    stack = pack(make().gate_up, scheme, matrices=2)
    want, asked = decoded(stack), []
    stack.codes, codes = None, stack.codes
    stack.on_disk = SimpleNamespace(read=lambda expert: asked.append(expert) or codes[expert])
    out = torch.full(stack.shape, torch.nan)
    stack.decode_(out, torch.tensor([0, 2, 2, 2, 5, 5], dtype=torch.int32))
    assert asked == [1, 4]
    assert torch.equal(out[asked], want[asked])
    assert out.isnan().all(2).all(1).tolist() == [True, False, True, True, False, True]
    assert torch.equal(layer.all_weights(stack, torch.float32), want)


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_the_dispatch_takes_packed_stacks(scheme):
    problem = small(tokens=3)
    stacks = packed(problem, scheme)
    whole = replace(problem, gate_up=decoded(stacks[0]), down=decoded(stacks[1]))
    got = replace(problem, gate_up=stacks[0], down=stacks[1]).with_gradients("triton")
    for a, b in zip(got, whole.with_gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_packed_stack_beside_a_plain_one():
    problem = small()
    gate_up, down = packed(problem, "nf4")
    for stacks in ((gate_up, problem.down), (problem.gate_up, down)):
        banks = [stack if isinstance(stack, torch.Tensor) else decoded(stack) for stack in stacks]
        torch.testing.assert_close(run(problem, stacks, "grouped"), run(problem, banks, "grouped"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_decoded_is_saved_for_backward(scheme, recompute):
    """Tokens, the gate_up output, weights, order and slots, as with plain stacks, and a number for each stack."""
    tokens, top_k, hidden, intermediate, experts = 32, 2, 32, 16, 6
    problem = small(torch.float16, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts)
    stacks = packed(problem, scheme)
    factors = {t.untyped_storage().data_ptr() for t in problem.leaves[2:]}
    sizes = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in factors:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run(problem, stacks, "grouped", recompute)
    rows, pairs = tokens * hidden * 2, tokens * top_k
    kept = 0 if recompute else pairs * 2 * intermediate * 2
    z = pairs * 8 * 2
    assert sum(sizes.values()) == rows + kept + z + pairs * 2 + (3 * pairs + experts) * 4 + experts * 8 + 2 * 8
    out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    problem = small()
    stacks = packed(problem, "nf4")
    want = torch.autograd.grad(run(problem, stacks, "grouped").sum(), problem.leaves)
    out = checkpoint(lambda x: run(replace(problem, x=x), stacks, "grouped"), problem.x, use_reentrant=reentrant)
    out.sum().backward()
    for leaf, grad in zip(problem.leaves, want, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_autocast_decodes_to_its_type():
    problem = small()
    stacks = packed(problem, "nf4")
    low = replace(problem, x=problem.x.detach().half().requires_grad_())
    want = run(low, plain(stacks, problem, "grouped", torch.float16), "grouped")
    with torch.autocast("cpu", torch.float16):
        out = run(problem, stacks, "grouped")
    torch.testing.assert_close(out, want.float(), rtol=2e-3, atol=2e-3)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("scheme", "backend"),
    [("nf4", "aot_eager"), ("fp8", "aot_eager"), pytest.param("nf4", "inductor", marks=needs_compiler)],
)
def test_compiles_to_one_graph(scheme, backend):
    problem = small()
    stacks = packed(problem, scheme)
    want = with_gradients(problem, run(problem, stacks, "grouped"))
    forward = torch.compile(
        lambda x: run(replace(problem, x=x * 1), stacks, "grouped"), backend=backend, fullgraph=True
    )
    for a, b in zip(with_gradients(problem, forward(problem.x)), want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_dispatch_compiles_too():
    problem = small(tokens=2)
    stacks = packed(problem, "nf4")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def forward(x):
        loras = {"gate_up_lora": problem.gate_up_lora, "down_lora": problem.down_lora}
        return expert_mlp(x * 1, problem.index, problem.weights, *stacks, **loras, backend="triton")

    whole = replace(problem, gate_up=decoded(stacks[0]), down=decoded(stacks[1]))
    torch.testing.assert_close(forward(problem.x), whole.run("reference"))


def test_handles_die_with_their_stacks():
    gc.collect()
    before = set(layer._PACKED)
    problem = small()
    stacks = packed(problem, "nf4")
    handles = {stack.handle for stack in stacks}
    want = torch.autograd.grad(run(problem, stacks, "grouped").sum(), problem.leaves)
    out = run(problem, stacks, "grouped")
    assert set(layer._PACKED) - before == handles
    del stacks
    for a, b in zip(torch.autograd.grad(out.sum(), problem.leaves), want, strict=True):
        assert torch.equal(a, b)  # the graph kept them
    del out
    gc.collect()
    assert set(layer._PACKED) == before


def test_a_copy_has_a_handle_of_its_own():
    stack = pack(small().down, "nf4")
    twin = copy.deepcopy(stack)
    assert twin.handle != stack.handle
    assert layer.stack_of(twin.handle) is twin
    assert layer.stack_of(stack.handle) is stack
