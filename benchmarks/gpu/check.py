"""Whether every set of products is right on this device, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import nn

from benchmarks.gpu.layers import Case, Forward, Shape, ours, ours_packed, step
from benchmarks.gpu.packed import SCHEMES
from finetune.kernels import device_op, reference, self_check
from finetune.kernels.blocks import pad_bank_
from finetune.kernels.layer import all_weights
from finetune.kernels.self_check import TOLERANCE
from finetune.kernels.support import decodes_on
from finetune.quant.experts import Scheme

TOKENS = (1, 7, 300, 1200)
"""At Qwen3-30B-A3B's shape, Triton's tiles of all three sizes."""

NAMES = ("x", "weights", "A1", "B1", "A2", "B2")


def faults(shape: Shape, products: list[str], device: torch.device) -> list[str]:
    """What is wrong, in words; empty when all is right."""
    found = []
    for name, padding, rank in product(products, (0, shape.rank), (1, 5, shape.rank, 64)):
        case = self_check.Case(name, device, shape.dtype, shape.hidden, shape.intermediate, rank, rank, padding)
        if fault := self_check.fault(case):
            found.append(f"{name}, padding {padding}, rank {rank}: {fault}")
    for name, tokens in product(products, TOKENS):
        found += [f"{name}, {tokens} tokens: {fault}" for fault in _against_reference(shape, name, tokens, device)]
    for scheme in SCHEMES:
        found += [f"{scheme}: {fault}" for fault in _decoded_bits(shape, scheme, device)]
    for name, scheme, tokens in product(products, SCHEMES, (1, 300)):
        found += [
            f"{name}, {scheme}, {tokens} tokens: {f}" for f in _against_decoded(shape, name, scheme, tokens, device)
        ]
    if device.type == "cuda":
        for way, forward in _ways_that_stay(shape, products, device).items():
            found += [f"{way}: {fault}" for fault in _stays_on_device(Case(shape, 256, device), forward)]
    return found


def _ways_that_stay(shape: Shape, products: list[str], device: torch.device) -> dict[str, Callable[[Case], Forward]]:
    """What should not wait for the host: products unless torch's do, and packed experts where Triton decodes them."""
    products = [name for name in products if name == "triton" or not _grouped_mm_waits(shape, device)]
    ways = {name: partial(ours, products=name, padding=name != "triton") for name in products}
    if decodes_on(device, shape.dtype):
        ways |= {f"{n}, {s}": partial(ours_packed, products=n, scheme=s) for n, s in product(products, SCHEMES)}
    return ways


def _grouped_mm_waits(shape: Shape, device: torch.device) -> bool:
    """Whether torch's grouped_mm loops over experts and reads where their rows end: pytorch/pytorch#169970."""
    return shape.dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10)


def gradients(case: Case, forward: Forward) -> list[torch.Tensor]:
    """Those of one step."""
    step(case, forward)
    return [leaf.grad for leaf in case.leaves]


def _against_reference(shape: Shape, products: str, tokens: int, device: torch.device) -> list[str]:
    """Every gradient of the whole layer, all experts, random routing."""
    case = Case(shape, tokens, device)
    layer = case.layer(case.banks)
    want = gradients(case, lambda: reference.expert_mlp(case.x, case.index, case.weights, layer))
    found = []
    for padding in (False, True):
        got = gradients(case, ours(case, products, padding=padding))
        found += [f"{fault} ({'blocks' if padding else 'no padding'})" for fault in differences(shape, got, want)]
    return found


def differences(shape: Shape, got: list[torch.Tensor], want: list[torch.Tensor]) -> list[str]:
    """Which gradients differ by more than rounding."""
    found = []
    for name, a, b in zip(NAMES, got, want, strict=True):
        error = float((a - b).float().norm() / b.float().norm())
        if not error <= TOLERANCE[shape.dtype]:
            found.append(f"gradient of {name} is wrong by {error:.2g}")
    return found


def _decoded_bits(shape: Shape, scheme: Scheme, device: torch.device) -> list[str]:
    """Some experts as the CPU decodes them."""
    found = []
    for stack in Case(shape, 1, device).packed(scheme):
        here, there = all_weights(stack, shape.dtype), stack.to("cpu")
        for expert in (0, shape.experts // 2, shape.experts - 1):
            if not torch.equal(here[expert].cpu(), there.weights_of((expert,), shape.dtype)[0]):
                found.append(f"expert {expert} of {tuple(stack.shape)} is decoded to other bits than on the CPU")
    return found


def _against_decoded(shape: Shape, products: str, scheme: Scheme, tokens: int, device: torch.device) -> list[str]:
    """Every gradient of a layer of packed experts: those that the same products give on the decoded weights."""
    case = Case(shape, tokens, device)
    stacks = case.packed(scheme)
    banks = [nn.Parameter(all_weights(stack, shape.dtype), requires_grad=False) for stack in stacks]
    for bank in banks:
        if products != "triton":  # they decode packed weights into block matrices
            pad_bank_(bank, shape.rank)
    mlp = partial(device_op.expert_mlp, case.x, case.index, case.weights)
    got, want = (gradients(case, partial(mlp, case.layer(held), False, products)) for held in (stacks, banks))
    return [f"gradient of {name} differs" for name, a, b in zip(NAMES, got, want, strict=True) if not torch.equal(a, b)]


def _stays_on_device(case: Case, way: Callable[[Case], Forward]) -> list[str]:
    """No host synchronization, and the same bits from a CUDA graph."""
    forward = way(case)
    want = [grad.clone() for grad in gradients(case, forward)]
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
