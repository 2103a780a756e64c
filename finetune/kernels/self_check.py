"""Whether the products of the device path are right on this device, for the strides they will be given.

Some builds of torch compute grouped products of transposed views wrongly and raise nothing, so nothing is taken on
trust: a small problem of the real widths is compared with the readable reference once per process and shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from finetune.kernels import device_op, reference
from finetune.kernels.blocks import make_room_
from finetune.kernels.layer import ExpertLayer, Factors

NUM_EXPERTS, NUM_TOKENS = 4, 160
"""Enough rows for each expert that Triton takes the tiles of a training step, its largest."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest relative error, by norm, of an output or a gradient; a wrong stride gives about 1."""


@dataclass(frozen=True)
class Case:
    """What decides the strides: widths, ranks (0 for no factors), room around the banks, and where it runs."""

    products: str
    device: torch.device
    dtype: torch.dtype
    hidden: int
    intermediate: int
    gate_up_rank: int
    down_rank: int
    room: int


@cache
def fault(case: Case) -> str | None:
    """What is wrong with these products here; None when they agree with the reference."""
    if case.products != "triton" and (case.hidden % 8 or case.intermediate % 8):
        return "grouped products need widths divisible by 8"
    if case.dtype not in TOLERANCE:
        return f"there are no products in {case.dtype}"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(case.device.type, enabled=False):
            return _compare(case)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton has errors of its own for compilers, tools and devices that lack something
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _compare(case: Case) -> str | None:
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=case.device) * std).to(dtype)

    hidden, intermediate = case.hidden, case.intermediate
    gate_up = nn.Parameter(normal(NUM_EXPERTS, 2 * intermediate, hidden, std=hidden**-0.5), requires_grad=False)
    down = nn.Parameter(normal(NUM_EXPERTS, hidden, intermediate, std=intermediate**-0.5), requires_grad=False)
    if case.room:
        make_room_(gate_up, case.room)
        make_room_(down, case.room)
    slot_E = torch.tensor([1, -1, 0, -1], device=case.device)

    def factors(rank: int, width: int, height: int) -> Factors | None:
        a_XRI, b_XOR = (normal(2, *shape, std=0.1, dtype=torch.float32) for shape in ((rank, width), (height, rank)))
        return Factors(a_XRI.requires_grad_(), b_XOR.requires_grad_(), 0.7, slot_E) if rank else None

    loras = factors(case.gate_up_rank, hidden, 2 * intermediate), factors(case.down_rank, intermediate, hidden)
    layer = ExpertLayer(gate_up, down, *loras)
    x_TH, d_out_TH = normal(NUM_TOKENS, hidden).requires_grad_(), normal(NUM_TOKENS, hidden)
    index_TK = torch.arange(NUM_TOKENS, device=case.device)[:, None] % 3 + torch.tensor([0, 1], device=case.device)
    index_TK = torch.where(index_TK == 3, 0, index_TK)  # no token for the last expert
    weights_TK = normal(NUM_TOKENS, 2).requires_grad_()
    leaves = [x_TH, weights_TK, *(t for lora in loras if lora for t in (lora.a_XRI, lora.b_XOR))]
    outs = (
        device_op.expert_mlp(x_TH, index_TK, weights_TK, layer, False, case.products),
        reference.expert_mlp(x_TH, index_TK, weights_TK, layer),
    )
    got, want = ([out, *torch.autograd.grad(out, leaves, d_out_TH)] for out in outs)
    names = ("output", "gradient of x", "gradient of the routing weights", *(["gradient of a factor"] * 4))
    for name, a, b in zip(names, got, want, strict=False):
        error = float((a - b).detach().float().norm() / b.detach().float().norm())
        if not error <= TOLERANCE[case.dtype]:
            return f"{name} is wrong by {error:.2g}"
    return None
