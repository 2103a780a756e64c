"""The device path on each set of products against the readable reference: outputs, gradients, memory, composition.

Triton's kernels run in its interpreter here, torch's grouped products on CPU.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.errors import TrainingError
from finetune.kernels import device_op, grouped
from finetune.kernels.blocks import pad_bank_
from finetune.kernels.layer import Dropout, ExpertLayer
from finetune.kernels.ops import expert_mlp
from finetune.kernels.triton import shapes
from finetune.kernels.triton.shapes import Shape, Shapes
from tests.kernels.problems import ODD_SHAPES, make, memory_full_of_nan, output_gradient

WAYS = {
    "triton": ("triton", 0),
    "grouped": ("grouped", 0),
    "grouped in blocks": ("grouped", 16),
    "hybrid": ("hybrid", 16),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def every_way(request):
    return request.param


@pytest.fixture(params=["triton", "grouped", "grouped in blocks"])
def way(request):
    return WAYS[request.param]


@pytest.fixture(params=["grouped in blocks", pytest.param("triton", marks=pytest.mark.slow)])
def one_way(request):
    """For what the operator does whatever its products are."""
    return WAYS[request.param]


def loras_of(problem):
    return [lora for lora in (problem.gate_up_lora, problem.down_lora) if lora is not None]


def run(problem, way, recompute=False):
    products, padding = way
    banks = [nn.Parameter(bank, requires_grad=False) for bank in (problem.gate_up, problem.down)]
    for bank in banks:
        if padding:
            pad_bank_(bank, max(padding, *(lora.a_XRI.shape[1] for lora in loras_of(problem)), 0))
    layer = ExpertLayer(*banks, problem.gate_up_lora, problem.down_lora, problem.dropout)
    return device_op.expert_mlp(problem.x, problem.index, problem.weights, layer, recompute, products)


def with_gradients(problem, way, **options):
    out = run(problem, way, **options)
    return [out.detach(), *torch.autograd.grad(out, problem.leaves, output_gradient(out))]


def assert_close(got, want, tolerance=3e-6):
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.isfinite().all()
        if a.numel():
            assert (a - b).norm() <= tolerance * max(1.0, float(b.norm()))


def small(dtype=torch.float32, **shape):
    """A problem whose widths all products take, multiples of 8."""
    return make(**{"hidden": 24, "intermediate": 8, **shape}, dtype=dtype, factor_dtype=torch.float32)


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES.keys())
def test_equals_the_reference(shape, every_way):
    problem = small(**shape)
    assert_close(with_gradients(problem, every_way), problem.with_gradients("reference"))


ODD_WIDTHS = {
    "H 12, I 7": {},
    "H == I": {"hidden": 9, "intermediate": 9},
    "H == 2I": {"hidden": 10, "intermediate": 5},
    "one of each": {"hidden": 1, "intermediate": 1, "rank": 1},
    "several tiles": {"hidden": 70, "intermediate": 133, "tokens": 3},
    "dropout": {"dropout": Dropout(0.3, 1)},
    "dropout, some frozen": {"dropout": Dropout(0.3, 1), "slots": (1, 4)},
}


@pytest.mark.parametrize("shape", ODD_WIDTHS.values(), ids=ODD_WIDTHS.keys())
def test_triton_takes_any_width(shape):
    problem = make(**shape, dtype=torch.float32)
    assert_close(with_gradients(problem, WAYS["triton"]), problem.with_gradients("reference"))


SHAPES = {
    "decode": shapes.DECODE,
    "sparse": shapes.SPARSE,
    "busy": shapes.BUSY,
    "wide": shapes.WIDE,
    "walk": Shape(64, 64, 32, 4, 3, programs=1),
    "walk, flat": Shape(64, 128, 32, 4, 3, programs=2, flat=True),
    "walk, many programs": Shape(16, 32, 32, 4, 3, programs=40),
    "walk, wide": Shape(32, 256, 64, 8, 3, programs=1),
}


TILED = [(name, 72) for name in SHAPES] + [("busy", 70), ("walk, flat", 70)]


@pytest.mark.parametrize(("name", "width"), TILED, ids=[f"{name}, {width}" for name, width in TILED])
def test_every_tile_shape(name, width):
    """TMA reads rows of 72 values, and not those of 70."""
    index = torch.tensor([[1, 0]] * 70 + [[1, 3]] * 3)
    problem = make(
        tokens=73, hidden=width, intermediate=width, experts=5, index=index, slots=(1, 3), dtype=torch.float32
    )
    want = problem.with_gradients("reference")
    with shapes.forced(Shapes.same(SHAPES[name])), memory_full_of_nan():
        assert_close(with_gradients(problem, WAYS["triton"]), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_like_the_reference(dtype, way):
    if dtype == torch.bfloat16 and way[0] != "grouped":
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    shape = {"tokens": 64, "hidden": 32, "intermediate": 16, "rank": 4}
    exact, low = make(**shape), make(**shape, dtype=dtype, factor_dtype=torch.float32)
    want, reference = exact.with_gradients("reference"), low.with_gradients("reference")
    for name, a, b, c in zip(
        ("out", "x", "w", "A1", "B1", "A2", "B2"), with_gradients(low, way), reference, want, strict=True
    ):
        assert a.dtype == b.dtype
        error, allowed = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error <= 2 * allowed + 1e-7, name  # without padding the low-rank part is rounded by itself


def test_recomputed_is_the_same(way):
    problem = small(slots=(0, 2, 5))
    for a, b in zip(with_gradients(problem, way, recompute=True), with_gradients(problem, way), strict=True):
        assert torch.equal(a, b)


def test_same_whatever_the_memory_held_before(every_way):
    problem = small(tokens=20, slots=(1, 4), dropout=Dropout(0.3, 1))
    want = problem.with_gradients("reference")
    plain = replace(problem, dropout=None)
    plain_want = plain.with_gradients("reference")
    with memory_full_of_nan():
        assert_close(with_gradients(problem, every_way), want)
        assert_close(with_gradients(plain, every_way), plain_want)


def test_idle_experts_are_not_read(every_way):
    problem = small(tokens=2, experts=12)
    want = problem.with_gradients("reference")
    idle = [expert for expert in range(12) if expert not in problem.index]
    for tensor in (problem.gate_up, problem.down, *(leaf.detach() for leaf in problem.leaves[2:])):
        tensor[idle] = torch.nan
    assert_close(with_gradients(problem, every_way), want)


def test_same_bits_every_time(way):
    problem = small(tokens=12)
    for a, b in zip(with_gradients(problem, way), with_gradients(problem, way), strict=True):
        assert torch.equal(a, b)


def test_only_asked_gradients_are_computed(one_way):
    problem = small()
    want = torch.autograd.grad(run(problem, one_way).sum(), problem.leaves)
    for needed in [{0}, {1}, {3}, {4}, {2, 3}, {0, 5}]:
        for i, leaf in enumerate(problem.leaves):
            leaf.grad = None
            leaf.requires_grad_(i in needed)
        run(problem, one_way).sum().backward()
        assert {i for i, leaf in enumerate(problem.leaves) if leaf.grad is not None} == needed
        assert_close([problem.leaves[i].grad for i in sorted(needed)], [want[i] for i in sorted(needed)])


def saved_bytes(problem, one_way, **options):
    known = {t.untyped_storage().data_ptr() for t in (*problem.leaves[2:], problem.down, problem.gate_up)}
    sizes = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known and tensor.ndim < 3:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(problem, one_way, **options)
    return sum(sizes.values())


def test_what_is_saved_for_backward(way):
    """Tokens, the gate_up output, routing weights and the order of rows: 28 KB per token in 16 bit at 30B's shape."""
    tokens, top_k, hidden, intermediate, experts = 32, 2, 32, 16, 6
    problem = small(torch.float16, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts)
    x, gate_up, weights = tokens * hidden * 2, tokens * top_k * 2 * intermediate * 2, tokens * top_k * 2
    tiles = 2 * (tokens * top_k // 16 + experts) if way[0] == "triton" else 0
    rank = problem.gate_up_lora.a_XRI.shape[1] if way[0] == "triton" else 8
    order, slots = (3 * tokens * top_k + experts + tiles) * 4, experts * 8 + tokens * top_k * rank * 2
    assert saved_bytes(problem, way) == x + gate_up + weights + order + slots
    assert saved_bytes(problem, way, recompute=True) == x + weights + order + slots


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_grad(mode, one_way):
    problem = small()
    with mode():
        out = run(problem, one_way)
    assert not out.requires_grad
    assert_close([out.clone()], [problem.run("reference").detach()])


def test_is_differentiable_once(one_way):
    problem = small()
    with pytest.raises(TrainingError, match="differentiable once only"):
        torch.autograd.grad(run(problem, one_way).sum(), [problem.x], create_graph=True)


def test_a_factor_changed_before_backward_is_noticed(one_way):
    problem = small()
    out = run(problem, one_way)
    with torch.no_grad():
        problem.leaves[3].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_other_factors_between_forward_and_backward_change_nothing(way):
    """A reference model's adapter may run on the same bank before the backward pass."""
    products, padding = way
    problem = small()
    banks = [nn.Parameter(bank, requires_grad=False) for bank in (problem.gate_up, problem.down)]
    for bank in banks:
        pad_bank_(bank, padding or 8)

    def forward(p):
        layer = ExpertLayer(*banks, p.gate_up_lora, p.down_lora)
        return device_op.expert_mlp(problem.x, problem.index, problem.weights, layer, False, products)

    out = forward(problem)
    forward(small(rank=2, seed=7))
    got = [out.detach(), *torch.autograd.grad(out, problem.leaves, output_gradient(out))]
    assert_close(got, problem.with_gradients("reference"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, one_way):
    problem = small()
    want = torch.autograd.grad(run(problem, one_way).sum(), problem.leaves)
    for leaf in problem.leaves:
        leaf.grad = None
    out = checkpoint(lambda x: run(replace(problem, x=x), one_way), problem.x, use_reentrant=reentrant)
    out.sum().backward()
    for leaf, b in zip(problem.leaves, want, strict=True):
        assert torch.equal(leaf.grad, b)


def test_autocast_computes_in_its_type(one_way):
    """Inside autocast to half precision a float32 layer gives what the half precision layer gives."""
    problem = small(tokens=16)
    low = replace(problem, x=problem.x.detach().half().requires_grad_())
    low = replace(low, gate_up=problem.gate_up.half(), down=problem.down.half())
    want = with_gradients(low, one_way)
    with torch.autocast("cpu", torch.float16):
        out = run(problem, one_way)
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out, problem.leaves, output_gradient(out))
    assert_close([out, *gradients], [t.float() for t in want], 2e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_to_one_graph(recompute, one_way):
    problem = small()
    want = with_gradients(problem, one_way, recompute=recompute)
    layer = ExpertLayer(problem.gate_up, problem.down, problem.gate_up_lora, problem.down_lora)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def forward(x, index, weights):
        return device_op.expert_mlp(x * 1, index, weights, layer, recompute, one_way[0])

    out = forward(problem.x, problem.index, problem.weights)
    got = [out.detach(), *torch.autograd.grad(out, problem.leaves, output_gradient(out))]
    assert_close(got, want)


def test_the_dispatch_compiles_too():
    problem = small(tokens=2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def forward(x, index, weights):
        loras = {"gate_up_lora": problem.gate_up_lora, "down_lora": problem.down_lora}
        return expert_mlp(x * 1, index, weights, problem.gate_up, problem.down, **loras, backend="triton")

    out = forward(problem.x, problem.index, problem.weights)
    assert_close([out.detach()], [problem.run("reference").detach()])


@pytest.mark.parametrize("keep", [False, True])
def test_operators_keep_their_promises(keep):
    problem = small()
    layer = ExpertLayer(problem.gate_up, problem.down, problem.gate_up_lora, problem.down_lora)
    call = device_op._Call.of(problem.x, problem.weights, layer, "grouped")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.finetune.expert_mlp.default, (*call, problem.index, keep), test_utils=tests)


def exact_grouped_mm(a, b, *, offs):
    """What grouped_mm computes, in any type."""
    spans = [slice(start, end) for start, end in itertools.pairwise([0, *offs.tolist()])]
    if b.ndim == 3:
        return torch.cat([a[span] @ b[e] for e, span in enumerate(spans)])
    return torch.stack([a[:, span] @ b[span] for span in spans])


@pytest.mark.parametrize("padding", [0, 8])
def test_gradcheck_of_the_block_matrix_in_float64(padding, monkeypatch):
    """grouped_mm has no float64; with its definition in its place the whole path is exact."""
    monkeypatch.setattr(grouped, "grouped_mm", exact_grouped_mm)
    problem = make(tokens=4, experts=3, hidden=5, intermediate=3, rank=2, slots=(2, 0))

    def forward(x, weights, a1, b1, a2, b2):
        loras = replace(problem.gate_up_lora, a_XRI=a1, b_XOR=b1), replace(problem.down_lora, a_XRI=a2, b_XOR=b2)
        return run(
            replace(problem, x=x, weights=weights, gate_up_lora=loras[0], down_lora=loras[1]), ("grouped", padding)
        )

    assert torch.autograd.gradcheck(forward, problem.leaves)
