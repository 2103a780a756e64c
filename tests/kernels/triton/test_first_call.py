"""The very first call of the expert layer, which chooses and checks its products, from wherever it may come."""

import logging
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from finetune.kernels import ops, self_check
from tests.kernels.problems import make, output_gradient


@pytest.fixture(autouse=True)
def first(monkeypatch):
    """Nothing has been chosen or checked; counts the checks."""
    compare, checks = self_check._compare, []
    monkeypatch.setattr(self_check, "_compare", lambda case: checks.append(case) or compare(case))

    def forget():
        self_check.fault.cache_clear()
        ops._choose_products.cache_clear()

    forget()
    yield checks
    forget()


def problem():
    return make(hidden=24, intermediate=8, tokens=5, dtype=torch.float32, factor_dtype=torch.float32)


def assert_close(got, want, tolerance=3e-6):
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b).norm() <= tolerance * max(1.0, float(b.norm()))


def gradients(p, run):
    out = run()
    out.backward(output_gradient(out))
    return [out.detach(), *(leaf.grad for leaf in p.leaves)]


def checkpointed(p, **options):
    return lambda: checkpoint(lambda x: replace(p, x=x).run("triton"), p.x, **options)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def tracked():
    """Hooks that know their own tensors only, as activation offload does."""
    known = {}

    def pack(tensor):
        known[len(known)] = tensor
        return len(known) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, known.pop):
        yield


PLACES = {
    "anywhere": nullcontext,
    "saved-tensor hooks": tracked,
    "activations on the CPU": torch.autograd.graph.save_on_cpu,
    "a dispatch mode": Passing,
    "another default device": lambda: torch.device("meta"),
    "autocast, disabled": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_inside(place, first):
    p = problem()

    def run():
        with place():
            return p.run("triton")

    assert_close(gradients(p, run), problem().with_gradients("reference"))
    assert len(first) == 1


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "early_stop": False}],
    ids=["not reentrant", "reentrant", "to the end"],
)
def test_inside_checkpoint(options, first):
    p = problem()
    assert_close(gradients(p, checkpointed(p, **options)), problem().with_gradients("reference"))
    assert len(first) == 1


def test_inside_checkpoint_and_offload(first):
    p = problem()

    def run():
        with torch.autograd.graph.save_on_cpu():
            return checkpointed(p, use_reentrant=False)()

    assert_close(gradients(p, run), problem().with_gradients("reference"))


def test_inside_autocast(first):
    p = problem()
    with torch.autocast("cpu", torch.float16):
        got = gradients(p, lambda: p.run("triton"))
    assert_close(got, problem().with_gradients("reference"), 5e-3)
    assert [case.dtype for case in first] == [torch.float16]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_and_then_training(mode, first):
    p = problem()
    with mode():
        assert not p.run("triton").requires_grad
    assert_close(gradients(p, lambda: p.run("triton")), problem().with_gradients("reference"))
    assert len(first) == 1


def test_inside_a_backward_pass(first):
    """Where autograd's own thread waits for the check on a GPU."""
    p, seen = problem(), []

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.no_grad():
                seen.append(p.run("triton"))
            return grad

    Late.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert_close(seen, [problem().run("reference").detach()])


def test_from_two_threads_at_once(first):
    p, ways, start = problem(), [], threading.Barrier(2)
    layer = ops.ExpertLayer(p.gate_up, p.down, p.gate_up_lora, p.down_lora)

    def call():
        start.wait()
        ways.append(ops.prepare(layer, "triton"))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == 1
    assert ways == ["triton"] * 2


def test_from_another_thread(first):
    p, got = problem(), []
    thread = threading.Thread(target=lambda: got.extend(gradients(p, checkpointed(p, use_reentrant=False))))
    thread.start()
    thread.join()
    assert_close(got, problem().with_gradients("reference"))


@pytest.mark.parametrize("around", [False, True], ids=["compiled", "checkpointed and compiled"])
def test_inside_compile(around, first):
    p = problem()

    def forward(x):
        return replace(p, x=x * 1).run("triton")

    def layer(x):
        return checkpoint(forward, x, use_reentrant=False) if around else forward(x)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(gradients(p, lambda: compiled(p.x)), problem().with_gradients("reference"))
    assert len(first) == 1


def test_what_is_prepared_is_not_checked_in_forward(first):
    p = problem()
    layer = ops.ExpertLayer(p.gate_up, p.down, p.gate_up_lora, p.down_lora)
    assert ops.prepare(layer, "triton") == "triton"
    assert len(first) == 1
    assert_close(gradients(p, lambda: p.run("triton")), problem().with_gradients("reference"))
    assert len(first) == 1


def test_an_error_is_raised_where_it_was_asked_for_and_asked_again(first, monkeypatch, caplog):
    def full(case):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr(self_check, "_compare", full)
        with pytest.raises(torch.OutOfMemoryError):
            problem().run("triton")
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert_close([problem().run("triton").detach()], [problem().run("reference").detach()])
