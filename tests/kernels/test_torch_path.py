"""The torch backend against the definition and the reference: outputs, every gradient, what is saved and skipped."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from finetune.errors import TrainingError
from finetune.kernels import arrangement
from finetune.kernels.ops import Dropout
from tests.kernels.problems import ODD_SHAPES, WITH_DELTAS, force_layout, make, memory_full_of_nan, output_gradient

LAYOUTS = ("by expert", "batched")


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    force_layout(monkeypatch, request.param)
    return request.param


def assert_close(actual, expected, tolerance=1e-12):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.isfinite().all()
        if a.numel():
            assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("shape", (ODD_SHAPES | WITH_DELTAS).values(), ids=ODD_SHAPES | WITH_DELTAS)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_equals_autograd_through_a_loop_over_tokens(shape, recompute, layout):
    problem = make(**shape)
    out = problem.per_token()
    gradients = torch.autograd.grad(out, problem.leaves, output_gradient(out), allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in problem.leaves]
    expected = [out.detach(), *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]
    assert_close(problem.with_gradients(recompute=recompute), expected)


@pytest.mark.parametrize("deltas", [(), ("gate_up", "down"), ("down",)], ids="+".join)
@pytest.mark.parametrize("targets", [(), ("gate_up", "down"), ("gate_up",), ("down",)], ids="+".join)
def test_gradcheck(targets, deltas, layout):
    shape = {"tokens": 4, "experts": 3, "hidden": 5, "intermediate": 3, "rank": 2, "slots": (2, 0)}
    problem = make(**shape, targets=targets, deltas=deltas)

    def run(*leaves):
        factors = list(leaves[2:])
        loras = {}
        for name in ("gate_up_lora", "down_lora"):
            if (lora := getattr(problem, name)) is not None:
                loras[name] = replace(lora, a_XRI=factors.pop(0), b_XOR=factors.pop(0))
        for name in ("gate_up_delta", "down_delta"):
            if (delta := getattr(problem, name)) is not None:
                loras[name] = replace(delta, delta_XOI=factors.pop(0))
        return replace(problem, x=leaves[0], weights=leaves[1], **loras).run()

    assert torch.autograd.gradcheck(run, problem.leaves)


@st.composite
def problems(draw):
    experts = draw(st.integers(1, 9))
    tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, min(experts, 4)))
    busy, seed = draw(st.integers(1, experts)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, max(busy, top_k), generator=generator).topk(top_k).indices
    return {
        "tokens": tokens,
        "experts": experts,
        "hidden": draw(st.integers(1, 20)),
        "intermediate": draw(st.integers(1, 20)),
        "rank": draw(st.integers(1, 17)),
        "index": index,
        "slots": draw(st.lists(st.integers(0, experts - 1), min_size=1, unique=True)),
        "dropout": draw(st.sampled_from([None, Dropout(0.4, 7)])),
        "seed": seed,
    }


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(shape=problems(), max_rows=st.integers(1, 60))
def test_equals_the_reference(name, shape, max_rows):
    with pytest.MonkeyPatch.context() as patch:
        force_layout(patch, name)
        patch.setattr(arrangement, "BLOCK_VALUES", max_rows * shape["hidden"])
        problem = make(**shape)
        assert_close(problem.with_gradients("torch"), problem.with_gradients("reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_like_the_reference(dtype, layout):
    exact = make(tokens=64, hidden=32, intermediate=16, dropout=Dropout(0.2, 3))
    low = make(tokens=64, hidden=32, intermediate=16, dropout=Dropout(0.2, 3), dtype=dtype, factor_dtype=torch.float32)
    want, reference = exact.with_gradients("reference"), low.with_gradients("reference")
    for name, a, b, c in zip(
        ("out", "x", "w", "A1", "B1", "A2", "B2"), low.with_gradients(), reference, want, strict=True
    ):
        assert a.dtype == b.dtype
        error, allowed = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error <= 1.5 * allowed + 1e-7, name


def test_backends_agree_whatever_the_memory_held_before(layout):
    problem = make(tokens=40, hidden=16, intermediate=16, slots=(1, 4), dropout=Dropout(0.3, 1))
    clean = problem.with_gradients("reference")
    with memory_full_of_nan():
        assert_close(problem.with_gradients(), clean)


def test_unreached_factors_get_zeros_not_none(layout):
    problem = make(**ODD_SHAPES["no trained expert hit"])
    problem.run().sum().backward()  # the gradient of sum has stride 0
    for leaf in problem.leaves[2:]:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_only_asked_gradients_are_computed(layout, monkeypatch):
    problem = make()
    want = dict(zip(range(6), torch.autograd.grad(problem.run().sum(), problem.leaves), strict=True))
    for needed in [{0}, {1}, {2}, {3}, {4}, {5}, {2, 3}, {4, 5}, {0, 5}, {1, 2}]:
        leaves = problem.leaves
        for i, leaf in enumerate(leaves):
            leaf.grad = None
            leaf.requires_grad_(i in needed)
        problem.run().sum().backward()
        assert {i for i, leaf in enumerate(leaves) if leaf.grad is not None} == needed
        assert_close([leaves[i].grad for i in sorted(needed)], [want[i] for i in sorted(needed)])


@pytest.fixture
def seen_through(monkeypatch):
    """A mode sees the products of the path, not the operator that stands for it."""
    monkeypatch.setattr("finetune.kernels.ops.is_in_torch_dispatch_mode", lambda: False)


class Products(TorchDispatchMode):
    """Shapes of the matrix products that run inside."""

    def __init__(self):
        super().__init__()
        self.found = {"mm": [], "bmm": [], "baddbmm_": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.found:
            self.found[name].append(tuple(tuple(t.shape) for t in args))
        return func(*args, **kwargs or {})


@pytest.mark.usefixtures("seen_through")
def test_frozen_experts_do_no_adapter_work(monkeypatch):
    force_layout(monkeypatch, "by expert")
    problem = make(tokens=30, experts=6, slots=(2,), rank=5)
    with Products() as products:
        problem.with_gradients()
    assert len(products.found["mm"]) == 6 * 4  # gate_up and down, forward and backward, none of them thin
    assert not any(5 in shape for product in products.found["mm"] for shape in product)
    assert len(products.found["baddbmm_"]) == 2 + 2
    assert len(products.found["bmm"]) == 2 + 2 + 2 + 4  # z forward, dz, z again, and four factor gradients
    assert {product[0][0] for product in products.found["bmm"]} == {1}  # of one expert


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.usefixtures("seen_through")
def test_decoding_touches_active_experts_only(tokens, layout):
    problem = make(tokens=tokens, experts=24, top_k=2)
    active = problem.index.unique().tolist()
    idle = [expert for expert in range(24) if expert not in active]
    want = problem.run("reference").detach()
    for tensor in (problem.gate_up, problem.down, *(leaf.detach() for leaf in problem.leaves[2:])):
        tensor[idle] = torch.nan
    with torch.no_grad(), Products() as products:
        assert_close([problem.run()], [want])
    multiplied = [p for p in (*products.found["mm"], *products.found["bmm"]) if 5 not in (*p[0], *p[1])]
    rows = sum(p[0][0] * (p[0][1] if len(p[0]) == 3 else 1) for p in multiplied)
    assert rows <= 2 * (tokens * 2 + len(active))  # gate_up and down of the pairs, hardly padded


class Copies(TorchDispatchMode):
    """Elements of all tensors of three dimensions that are made inside by copying others."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ in ("_to_copy", "index_select", "clone", "cat", "stack") and out.ndim == 3:
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.usefixtures("seen_through")
def test_decoding_copies_factors_of_active_experts_only(tokens, layout):
    """Each once to gather it and once to cast it, at Qwen3-30B-A3B's experts per token; the frozen weights never."""
    problem = make(tokens, 128, 32, 16, 8, 4, dtype=torch.bfloat16, factor_dtype=torch.float32)
    gathered = 0 if layout == "by expert" else problem.gate_up[0].numel() + problem.down[0].numel()
    factors = sum(leaf[0].numel() for leaf in problem.leaves[2:])
    with torch.no_grad(), Copies() as copies:
        problem.run()
    assert 0 < copies.elements <= len(problem.index.unique()) * (2 * factors + gathered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_for_backward(dtype):
    """Tokens and the gate_up output, 28 KB per token at Qwen3-30B-A3B's shape in 16 bit, and next to nothing else."""
    tokens, top_k, hidden, intermediate = 256, 8, 256, 96
    problem = make(tokens, 16, hidden, intermediate, top_k, 4, dtype=dtype, factor_dtype=torch.float32)
    frozen = {t.untyped_storage().data_ptr() for t in (problem.gate_up, problem.down, *problem.leaves[2:])}

    def saved(**options):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                sizes[storage.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with pytest.MonkeyPatch.context() as patch:
            force_layout(patch, "by expert")
            patch.setattr(arrangement, "BLOCK_ELEMENTS", 0)  # as for big experts
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = problem.run(**options)
        return sum(sizes.values()), out.grad_fn.arrangement.rows

    num_bytes, rows = saved()
    x, weights, per_row = (n * dtype.itemsize for n in (tokens * hidden, tokens * top_k, 2 * intermediate))
    assert num_bytes == x + weights + len(rows.pair_N) * per_row
    assert len(rows.pair_N) <= tokens * top_k * (1 if dtype == torch.float32 else 1.08)
    assert (rows.pair_N.dtype, rows.row_P.dtype) == (torch.int64, torch.int64)
    assert saved(recompute=True)[0] == x + weights


def test_no_graph_without_grad(layout):
    problem = make()
    with torch.no_grad():
        out = problem.run()
    assert out.grad_fn is None
    assert_close([out], [problem.run().detach()])


def test_is_differentiable_once(layout):
    problem = make()
    with pytest.raises(TrainingError, match="differentiable once only"):
        torch.autograd.grad(problem.run().sum(), [problem.x], create_graph=True)


def test_a_factor_changed_before_backward_is_noticed(layout):
    problem = make()
    out = problem.run()
    with torch.no_grad():
        problem.leaves[3].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_same_bits_every_time(layout):
    problem = make(tokens=200, hidden=32, intermediate=32, dtype=torch.float32)
    first = problem.with_gradients()
    for a, b in zip(first, problem.with_gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing_is_exact_with_dropout(reentrant, recompute, layout):
    problem = make(tokens=20, dtype=torch.float32)

    def forward(x):
        return replace(problem, x=x, dropout=Dropout.draw(0.5)).run(recompute=recompute) * 2

    def gradients(run):
        torch.manual_seed(3)
        return torch.autograd.grad(run(), problem.leaves, torch.ones_like(problem.x), retain_graph=False)

    plain = gradients(lambda: forward(problem.x))
    if reentrant:
        for leaf in problem.leaves:
            leaf.grad = None
        torch.manual_seed(3)
        checkpoint(forward, problem.x, use_reentrant=True).backward(torch.ones_like(problem.x))
        other = [leaf.grad for leaf in problem.leaves]
    else:
        other = gradients(lambda: checkpoint(forward, problem.x, use_reentrant=False))
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_type_and_keeps_the_output_type(layout):
    problem = make(tokens=16, hidden=32, intermediate=32, dtype=torch.float32)
    low = replace(problem, x=problem.x.detach().bfloat16().requires_grad_(), gate_up=problem.gate_up.bfloat16())
    low = replace(low, down=problem.down.bfloat16(), weights=problem.weights.detach().bfloat16().requires_grad_())
    want = low.with_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run()
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out, problem.leaves, output_gradient(out))
    assert [g.dtype for g in gradients] == [torch.float32] * 6
    for a, b in zip([out, *gradients], want, strict=True):
        assert torch.equal(a, b.float())


def test_autocast_leaves_float64_alone(layout):
    problem = make()
    want = problem.with_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(problem.with_gradients(), want)


def test_backward_inside_autocast_changes_nothing(layout):
    problem = make(dtype=torch.float32)
    want = torch.autograd.grad(problem.run().sum(), problem.leaves)
    out = problem.run()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(out.sum(), problem.leaves)
    for a, b in zip(gradients, want, strict=True):
        assert torch.equal(a, b)


def test_float32_tokens_through_bfloat16_experts(layout):
    """A norm in float32 may feed experts held in bfloat16; the output has the tokens' type."""
    problem = make(dtype=torch.bfloat16, factor_dtype=torch.float32)
    mixed = replace(problem, x=problem.x.detach().float().requires_grad_())
    assert mixed.run().dtype == torch.float32
    assert torch.equal(mixed.run(), problem.run().float())


def test_dropout_masks():
    dropout = Dropout(0.25, 11)
    tokens, pairs = dropout.token_mask(400, 50, torch.device("cpu")), dropout.pair_mask(400, 50, torch.device("cpu"))
    for mask in (tokens, pairs):
        assert abs(float(mask.double().mean()) - 0.75) < 0.02
    assert not torch.equal(tokens, pairs)
    assert torch.equal(tokens, dropout.token_mask(400, 50, torch.device("cpu")))
    torch.manual_seed(4)
    seeds = {int(Dropout.draw(0.1).seed) for _ in range(20)}
    assert len(seeds) == 20
    torch.manual_seed(4)
    assert int(Dropout.draw(0.1).seed) in seeds


def test_no_warnings(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(dropout=Dropout(0.1, 0), dtype=torch.bfloat16).with_gradients()


@pytest.mark.parametrize("hot", [False, True], ids=["even", "one hot expert"])
def test_sixteen_thousand_tokens(hot, layout):
    tokens, experts = 16384, 16
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    index[:, 3] += float(hot)
    problem = make(experts=experts, tokens=tokens, index=index.topk(2).indices, dtype=torch.float32, rank=4)
    assert_close(problem.with_gradients(), problem.with_gradients("reference"), 2e-5)
