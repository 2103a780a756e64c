"""Whether every set of products is right on this device, before anything is timed."""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.gpu.layers import Case, Forward, Shape, ours, step
from finetune.kernels import reference, self_check
from finetune.kernels.self_check import TOLERANCE


def faults(shape: Shape, products: list[str], device: torch.device) -> list[str]:
    """What is wrong, in words; empty when all is right."""
    found = []
    for name, room, rank in product(products, (0, shape.rank), (1, 5, shape.rank, 64)):
        case = self_check.Case(name, device, shape.dtype, shape.hidden, shape.intermediate, rank, rank, room)
        if fault := self_check.fault(case):
            found.append(f"{name}, room {room}, rank {rank}: {fault}")
    for name, tokens in product(products, (1, 7, 300)):
        found += [f"{name}, {tokens} tokens: {fault}" for fault in _against_reference(shape, name, tokens, device)]
    if device.type == "cuda":
        for name in products:
            found += [f"{name}: {fault}" for fault in _stays_on_device(shape, name, device)]
    return found


def _gradients(case: Case, forward: Forward) -> list[torch.Tensor]:
    step(case, forward)
    return [leaf.grad for leaf in case.leaves]


def _against_reference(shape: Shape, products: str, tokens: int, device: torch.device) -> list[str]:
    """Every gradient of the whole layer, all experts, random routing."""
    case = Case(shape, tokens, device)
    layer = case.layer(case.banks)
    want = _gradients(case, lambda: reference.expert_mlp(case.x, case.index, case.weights, layer))
    found = []
    for room in (False, True):
        got = _gradients(case, ours(case, products, room=room))
        for name, a, b in zip(("x", "weights", "A1", "B1", "A2", "B2"), got, want, strict=True):
            error = float((a - b).float().norm() / b.float().norm())
            if not error <= TOLERANCE[shape.dtype]:
                found.append(f"gradient of {name} is wrong by {error:.2g} ({'blocks' if room else 'no room'})")
    return found


def _stays_on_device(shape: Shape, products: str, device: torch.device) -> list[str]:
    """No host synchronization, and the same bits from a CUDA graph."""
    case = Case(shape, 256, device)
    forward = ours(case, products, room=products != "triton")
    want = [grad.clone() for grad in _gradients(case, forward)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, forward)
    except RuntimeError as error:
        return [f"waits for the host: {error}"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(case, forward)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for leaf in case.leaves:
        leaf.grad = None
    with torch.cuda.graph(graph):
        forward().backward(case.d_out)
    graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(leaf.grad, grad) for leaf, grad in zip(case.leaves, want, strict=True))
    return [] if same else ["a CUDA graph gives other bits"]
