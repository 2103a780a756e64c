"""How many things one expert layer starts on a device, forward and backward: the numbers may only fall."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction

from finetune.kernels import decoded, device_op
from finetune.kernels.layer import ExpertLayer
from tests.kernels.problems import make, output_gradient
from tests.quant.packed import SCHEMES, pack

STARTS_NOTHING = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute",
    "reshape", "select", "slice", "split", "split_with_sizes", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Torch's operations that start something on a device, by name."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in STARTS_NOTHING:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_counted(counted, monkeypatch):
    """Triton's kernels by name; none runs, and rows and pairs are all the first."""

    def run(self, *args, **kwargs):
        counted[self.fn.__name__] += 1
        if self.fn.__name__ == "place_pairs":
            args[2].zero_()

    with monkeypatch.context() as patched:
        patched.setattr(InterpretedFunction, "run", run)
        yield


def problem(**options):
    return make(hidden=24, intermediate=8, tokens=6, dtype=torch.float32, factor_dtype=torch.float32, **options)


def layer_of(p):
    return ExpertLayer(p.gate_up, p.down, p.gate_up_lora, p.down_lora)


def test_kernels_of_a_layer(monkeypatch):
    p, counted = problem(), Counter()
    with kernels_counted(counted, monkeypatch):
        out = device_op.expert_mlp(p.x, p.index, p.weights, layer_of(p), False, "triton")
        forward = counted.total()
        torch.autograd.grad(out, p.leaves, output_gradient(out))
    assert forward <= 7
    assert counted.total() - forward <= 10


def test_torch_operations_of_a_layer(monkeypatch):
    """Inside the operators, where a mode sees what they are made of."""
    p, forward, backward = problem(), Counter(), Counter()
    with kernels_counted(Counter(), monkeypatch), torch.no_grad():
        call = device_op._Call.of(p.x, p.weights, layer_of(p), "triton")
        with Operations(forward):
            out, *kept = device_op._run_forward(call, p.index, True)
        d_out = output_gradient(out)
        with Operations(backward):
            device_op._run_backward(call, d_out, *kept, [True] * 6)
    assert forward == {"zero_": 1}  # of the kernel's stand-in
    assert backward == {"sum": 1}


@pytest.fixture
def decodings(monkeypatch):
    """Handles of the stacks that were decoded, in order."""
    handles = []
    for kind in {type(pack(problem().down, scheme)) for scheme in SCHEMES}:
        decode = kind.decode_
        monkeypatch.setattr(
            kind, "decode_", lambda self, *args, decode=decode: handles.append(self.handle) or decode(self, *args)
        )
    decoded._KEPT.clear()
    return handles


def two_layers(p, stacks, products, *, reentrant=None):
    """A packed layer twice in a row with other weights, checkpointed one by one or not."""
    x = p.x
    for pair in stacks:
        layer = ExpertLayer(*pair, p.gate_up_lora, p.down_lora)

        def run(x, layer=layer):
            return x + device_op.expert_mlp(x, p.index, p.weights, layer, False, products)

        x = run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
    return x


def gradients(p, out):
    for leaf in p.leaves:
        leaf.grad = None
    out.backward(output_gradient(out))
    return [leaf.grad.clone() for leaf in p.leaves]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("products", "scheme"), [("grouped", "nf4"), ("grouped", "fp8"), pytest.param("triton", "nf4")]
)
def test_a_repeated_forward_and_its_gradient_decode_once(products, scheme, reentrant, decodings):
    p = problem(slots=(0, 3))
    stacks = [(pack(s * p.gate_up, scheme, matrices=2), pack(s * p.down, scheme)) for s in (1.0, 0.7)]
    first, second = ([stack.handle for stack in pair] for pair in stacks)
    want = gradients(p, two_layers(p, stacks, products))
    assert decodings == [*first, *second, *second, *first]  # without checkpointing nothing waits for backward
    assert not decoded._KEPT
    decodings.clear()
    got = gradients(p, two_layers(p, stacks, products, reentrant=reentrant))
    assert decodings == [*first, *second, *second, *first]
    assert not decoded._KEPT  # taken by the gradients
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_only_what_was_decoded_for_the_same_rows_is_taken(decodings):
    p = problem()
    stack = pack(p.down, "nf4")
    few, all_ = (torch.tensor(ends, dtype=torch.int32) for ends in ([1, 2, 2, 2, 2, 2], [1, 2, 3, 4, 5, 6]))
    kept = decoded.decode(stack, torch.float32, 0, few, keep=True)
    assert decoded.decode(stack, torch.float16, 0, few, keep=False).dtype == torch.float16
    assert decoded.decode(stack, torch.float32, 0, few, keep=False) is kept
    decoded.decode(stack, torch.float32, 0, few, keep=True)
    assert torch.equal(
        decoded.decode(stack, torch.float32, 0, all_, keep=False), stack.weights_of(range(6), torch.float32)
    )
    assert len(decodings) == 4


def test_one_layer_waits_at_most(decodings):
    p = problem()
    stacks = [pack(p.down, "nf4") for _ in range(3)]
    for stack in stacks:
        decoded.decode(stack, torch.float32, 0, torch.tensor([6] * 6, dtype=torch.int32), keep=True)
        assert [key[0] for key in decoded._KEPT] == [stack.handle]


def test_operators_and_what_passes_them_by_agree():
    p, seen = problem(), Counter()
    out = device_op.expert_mlp(p.x, p.index, p.weights, layer_of(p), False, "grouped")
    want = gradients(p, out)
    with Operations(seen):
        again = device_op.expert_mlp(p.x, p.index, p.weights, layer_of(p), False, "grouped")
    assert seen["expert_mlp"] == 1  # what selective checkpointing recognizes
    assert torch.equal(out, again)
    for a, b in zip(gradients(p, again), want, strict=True):
        assert torch.equal(a, b)
    frozen = replace(p, x=p.x.detach(), weights=p.weights.detach())
    with torch.no_grad():
        assert torch.equal(device_op.expert_mlp(frozen.x, p.index, frozen.weights, layer_of(p), False, "grouped"), out)
