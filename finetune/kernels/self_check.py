"""Whether the products of the device path are right on this device, for the strides they will be given.

Some builds of torch compute grouped products of transposed views wrongly and raise nothing, so nothing is taken on
trust: a small problem of the real widths is compared with the readable reference once per process and shape. The check
runs in a thread of its own and needs no autograd on the device, so it may be asked for from anywhere, also from inside
a backward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from finetune.kernels import device_op, reference
from finetune.kernels.blocks import pad_bank_
from finetune.kernels.layer import ExpertLayer, Factors
from finetune.kernels.once import once_apart
from finetune.kernels.triton.shapes import Shapes, forced

NAMES = ("output", "gradient of x", "gradient of the routing weights", *(["gradient of a factor"] * 4))
NUM_EXPERTS, NUM_TOKENS = 4, 160
"""Enough rows for each expert that Triton takes the tiles of a training step, its largest."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest relative error, by norm, of an output or a gradient; a wrong stride gives about 1."""


@dataclass(frozen=True)
class Case:
    """What decides the strides: widths, ranks (0 for no factors), padding around the banks, and where it runs.

    tiles: of Triton's products; those that a call would take when None.
    """

    products: str
    device: torch.device
    dtype: torch.dtype
    hidden: int
    intermediate: int
    gate_up_rank: int
    down_rank: int
    padding: int
    tokens: int = field(default=NUM_TOKENS, kw_only=True)
    tiles: Shapes | None = field(default=None, kw_only=True)


@once_apart
def fault(case: Case) -> str | None:
    """What is wrong with these products here; None when they agree with the reference."""
    if case.products != "triton" and (case.hidden % 8 or case.intermediate % 8):
        return "grouped products need widths divisible by 8"
    if case.dtype not in TOLERANCE:
        return f"there are no products in {case.dtype}"
    try:
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
    if case.padding:
        pad_bank_(gate_up, case.padding)
        pad_bank_(down, case.padding)
    slot_E = torch.tensor([1, -1, 0, -1], device=case.device)

    def factors(rank: int, width: int, height: int) -> Factors | None:
        a_XRI, b_XOR = (normal(2, *shape, std=0.1, dtype=torch.float32) for shape in ((rank, width), (height, rank)))
        return Factors(a_XRI.requires_grad_(), b_XOR.requires_grad_(), 0.7, slot_E) if rank else None

    loras = factors(case.gate_up_rank, hidden, 2 * intermediate), factors(case.down_rank, intermediate, hidden)
    layer = ExpertLayer(gate_up, down, *loras)
    x_TH, d_out_TH = normal(case.tokens, hidden).requires_grad_(), normal(case.tokens, hidden)
    index_TK = torch.arange(case.tokens, device=case.device)[:, None] % 3 + torch.tensor([0, 1], device=case.device)
    index_TK = torch.where(index_TK == 3, 0, index_TK)  # no token for the last expert
    weights_TK = normal(case.tokens, 2).requires_grad_()
    with nullcontext() if case.tiles is None else forced(case.tiles):
        got = device_op.with_gradients(x_TH, index_TK, weights_TK, layer, d_out_TH, case.products)
    want = _reference(x_TH, index_TK, weights_TK, layer, d_out_TH)
    for name, a, b in zip(NAMES, got, want, strict=True):
        if a is None or b is None:
            continue
        error = float((a.float().cpu() - b).norm() / b.norm())
        if not error <= TOLERANCE[case.dtype]:
            return f"{name} is wrong by {error:.2g}"
    return None


def _reference(
    x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, layer: ExpertLayer, d_out_TH: Tensor
) -> list[Tensor | None]:
    """What `device_op.with_gradients` gives, in float32 on the CPU: autograd's thread for the device may be waiting."""

    def here(tensor: Tensor) -> Tensor:
        return tensor.detach().float().cpu().requires_grad_(tensor.requires_grad)

    def factors(lora: Factors | None) -> Factors | None:
        if lora is None:
            return None
        a_XRI, b_XOR = here(lora.a_XRI), here(lora.b_XOR)
        return replace(lora, a_XRI=a_XRI, b_XOR=b_XOR, slot_of_expert=lora.slot_of_expert.cpu())

    assert isinstance(layer.gate_up_EGH, Tensor)
    assert isinstance(layer.down_EHI, Tensor)
    loras = factors(layer.gate_up_lora), factors(layer.down_lora)
    x_TH, weights_TK = here(x_TH), here(weights_TK)
    twin = ExpertLayer(here(layer.gate_up_EGH), here(layer.down_EHI), *loras)
    out_TH = reference.expert_mlp(x_TH, index_TK.cpu(), weights_TK, twin)
    leaves = [x_TH, weights_TK, *(t for lora in loras for t in ((lora.a_XRI, lora.b_XOR) if lora else (None, None)))]
    found = iter(torch.autograd.grad(out_TH, [leaf for leaf in leaves if leaf is not None], here(d_out_TH)))
    return [out_TH.detach(), *(None if leaf is None else next(found) for leaf in leaves)]
