"""The one function of this package: the expert MLP with LoRA, and the only place that chooses how it is computed."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from finetune.errors import AdapterError, Problem
from finetune.kernels import device_op, reference, self_check, torch_op, torch_path
from finetune.kernels.blocks import pad_bank_, padding_of, rounded_rank
from finetune.kernels.layer import Deltas, Dropout, ExpertLayer, Factors, PackedStack, Stack
from finetune.kernels.support import triton_fault

__all__ = [
    "Backend",
    "Deltas",
    "Dropout",
    "ExpertLayer",
    "Factors",
    "PackedStack",
    "expert_mlp",
    "pad_bank_",
    "prepare",
]

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("reference", "torch", "triton")
GO_ON = (
    "install a torch and a Triton that know this card; or go on at a fraction of the speed, one product per expert: "
    "name the backend, `train.expert_backend: torch` in a recipe, `backend='torch'` in Python"
)

logger = logging.getLogger(__name__)


def expert_mlp(
    x_TH: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    gate_up_EGH: Stack,
    down_EHI: Stack,
    *,
    gate_up_lora: Factors | None = None,
    down_lora: Factors | None = None,
    gate_up_delta: Deltas | None = None,
    down_delta: Deltas | None = None,
    dropout: Dropout | None = None,
    backend: Backend = "auto",
    recompute: bool = False,
) -> Tensor:
    """y_t = sum_k w_tk down_e(silu(gate_e(x_t)) * up_e(x_t)) with e = index_tk, LoRA on either projection. (T, H).

    x_TH: tokens; the output has their type. Products run in the experts' type, or in autocast's inside autocast.
    top_k_index_TK: expert ids, int64, different within a row.
    top_k_weights_TK: routing weights.
    gate_up_EGH: frozen [gate; up] stacked on G = 2I. down_EHI: frozen down projection. They get no gradient.
        Either may be a PackedStack: its weights are decoded per expert, again in backward, and never saved.
    gate_up_lora, down_lora: low-rank factors; x, the routing weights and the factors are differentiable once.
        Factors that no token reaches get zeros as gradients, not None.
    gate_up_delta, down_delta: changes of whole experts, differentiable as factors are; a gradient is computed for their
        slots alone. They have products per expert on any device: `triton` refuses them.
    dropout: on what the factors read.
    backend: `reference` (readable, slow), `torch` (any device: products per expert on CPU, grouped on CUDA), `triton`
        (CUDA; products in torch where `pad_bank_` laid out the experts), `auto`.
    recompute: save x alone for backward and compute gate_up again there.

    Raises AdapterError for shapes that do not fit, experts that require gradients, or a backend that cannot run.
    """
    layer = ExpertLayer(gate_up_EGH, down_EHI, gate_up_lora, down_lora, dropout, gate_up_delta, down_delta)
    problems = _problems(x_TH, top_k_index_TK, top_k_weights_TK, layer)
    if problems:
        raise AdapterError(*problems)
    way = _choose(backend, layer)
    if way == "reference":
        return reference.expert_mlp(x_TH, top_k_index_TK, top_k_weights_TK, layer)
    if way in device_op.PRODUCTS:
        return device_op.expert_mlp(x_TH, top_k_index_TK, top_k_weights_TK, layer, recompute, way)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # what looks at operators should see one
        return torch_op.expert_mlp(x_TH, top_k_index_TK, top_k_weights_TK, layer, recompute)
    return torch_path.expert_mlp(x_TH, top_k_index_TK, top_k_weights_TK, layer, recompute)


def prepare(layer: ExpertLayer, backend: Backend = "auto") -> str:
    """Choose and check the products of a layer before its first call; the way it will go.

    Also inside the autocast that the calls will be in. A first call that nothing prepared does the same by itself.
    Raises AdapterError as `expert_mlp` does.
    """
    return _choose(backend, layer)


def _choose(backend: Backend, layer: ExpertLayer) -> str:
    """`reference`, `slices`, or one of device_op.PRODUCTS."""
    if backend not in ("auto", *BACKENDS):
        hint = f"use one of {', '.join(BACKENDS)}, or auto"
        raise AdapterError(Problem("backend", "cannot run here", hint, backend))
    on_gpu = layer.down_EHI.device.type == "cuda"
    if layer.gate_up_delta or layer.down_delta:
        if backend == "triton":
            hint = "use one of reference, torch, or auto"
            raise AdapterError(Problem("backend", "has no products for experts that train whole", hint, backend))
        on_gpu = False
    if backend == "reference" or (not on_gpu and backend != "triton"):
        return _log_once("slices") if backend == "auto" else "slices" if backend == "torch" else backend
    return _products(backend, *_key(layer))


def _key(layer: ExpertLayer) -> tuple[bool, str, torch.dtype, int, int, int, int, int]:
    """What decides between products, as torch.compile can hold it; the padding counts where it holds both factors.

    First of all, whether the experts are packed: grouped products decode them into padded matrices of their own.
    """
    loras, banks = (layer.gate_up_lora, layer.down_lora), (layer.gate_up_EGH, layer.down_EHI)
    ranks = [0 if lora is None else lora.a_XRI.shape[1] for lora in loras]
    packed = not any(isinstance(bank, Tensor) for bank in banks)
    paddings = [rounded_rank(max(ranks)) if packed else padding_of(bank) for bank in banks]
    padding = min(paddings) if paddings[0] >= ranks[0] and paddings[1] >= ranks[1] else 0
    _, hidden, intermediate = layer.down_EHI.shape
    return packed, str(layer.down_EHI.device), layer.compute_dtype(), hidden, intermediate, ranks[0], ranks[1], padding


@torch.compiler.assume_constant_result
def _products(backend: Backend, packed: bool, device: str, dtype: torch.dtype, *sizes: int) -> str:
    return _choose_products(backend, self_check.Case("", torch.device(device), dtype, *sizes), packed)


@cache
def _choose_products(backend: Backend, case: self_check.Case, packed: bool = False) -> str:
    """The products for an accelerator: the first way that is right there.

    By name, `triton` is Triton's or an error. `torch` is torch's: grouped where they are right, else one product per
    expert, loudly. `auto` never ends at products per expert: that is an error that says what failed.
    """
    triton = "hybrid" if case.padding and not packed else "triton"
    faults = {}
    for way in {"triton": [triton], "torch": ["grouped"], "auto": [triton, "grouped"]}[backend]:
        fault = triton_fault(case.device) if way != "grouped" else None
        fault = fault or _checked(replace(case, products=way, padding=0 if way == "triton" else case.padding))
        if fault is None:
            return _log_once(way)
        faults[way] = fault
        if backend == "auto":
            logger.warning("expert MLP: %s products are not used on %s: %s", way, case.device, fault)
    reasons = "; ".join(f"{way} products: {fault}" for way, fault in faults.items())
    if backend == "torch":
        logger.warning("expert MLP: one product per expert, slow and with host waits, on %s: %s", case.device, reasons)
        return _log_once("slices")
    hint = GO_ON if backend == "auto" else f"use one of {', '.join(BACKENDS[:2])}, or auto"
    raise AdapterError(Problem("backend", f"cannot run here: {reasons}", hint, backend))


def _checked(case: self_check.Case) -> str | None:
    """`self_check.fault`, which reads results to the host: not while a CUDA graph is captured."""
    if case.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        hint = "call finetune.kernels.ops.prepare or run one step before the capture"
        raise AdapterError(Problem("expert MLP", "is called for the first time while a CUDA graph is captured", hint))
    return self_check.fault(case)


@torch.compiler.assume_constant_result
def _log_once(way: str) -> str:
    return _log(way)


@cache
def _log(way: str) -> str:
    logger.info("expert MLP runs on %s products", way)
    return way


def _problems(x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, layer: ExpertLayer) -> list[Problem]:
    """What does not fit together."""
    hint = "see the shapes in the docstring of expert_mlp"
    gate_up, down = layer.gate_up_EGH, layer.down_EHI
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        what = "gate_up must be (E, 2I, H) and down (E, H, I)"
        return [Problem("experts", what, hint, (tuple(gate_up.shape), tuple(down.shape)))]
    num_experts, hidden, intermediate = down.shape
    expected = {
        "gate_up": (gate_up.shape, (num_experts, 2 * intermediate, hidden)),
        "x": (x_TH.shape, (*x_TH.shape[:1], hidden)),
        "top_k_index": (index_TK.shape, (*x_TH.shape[:1], *index_TK.shape[1:2])),
        "top_k_weights": (weights_TK.shape, tuple(index_TK.shape)),
    }
    problems = [
        Problem(name, f"must have the shape {shape}", hint, tuple(got))
        for name, (got, shape) in expected.items()
        if tuple(got) != shape
    ]
    if torch.is_grad_enabled() and any(isinstance(stack, Tensor) and stack.requires_grad for stack in (gate_up, down)):
        hint_frozen = "call requires_grad_(False) on the experts: only factors are trained"
        problems.append(Problem("experts", "require gradients, which are never computed", hint_frozen))
    problems += _delta_problems("gate_up", layer.gate_up_delta, gate_up)
    problems += _delta_problems("down", layer.down_delta, down)
    problems += _factor_problems("gate_up", layer.gate_up_lora, num_experts, (hidden, 2 * intermediate))
    return problems + _factor_problems("down", layer.down_lora, num_experts, (intermediate, hidden))


def _delta_problems(name: str, delta: Deltas | None, bank_EOI: Stack) -> list[Problem]:
    if delta is None:
        return []
    shape, hint = (*delta.delta_XOI.shape[:1], *bank_EOI.shape[1:]), "one slot of a whole weight per trained expert"
    problems = []
    if tuple(delta.delta_XOI.shape) != shape:
        got = tuple(delta.delta_XOI.shape)
        problems.append(Problem(f"{name} delta", f"must have the shape {shape}", hint, got))
    if tuple(delta.slot_of_expert.shape) != bank_EOI.shape[:1]:
        got = tuple(delta.slot_of_expert.shape)
        problems.append(Problem(f"{name} delta's slot_of_expert", "must have a slot or -1 per expert", hint, got))
    return problems


def _factor_problems(name: str, lora: Factors | None, num_experts: int, widths: tuple[int, int]) -> list[Problem]:
    if lora is None:
        return []
    num_slots, rank = (*lora.a_XRI.shape, 0, 0)[:2]
    expected = {
        "A": (lora.a_XRI.shape, (num_slots, rank, widths[0])),
        "B": (lora.b_XOR.shape, (num_slots, widths[1], rank)),
        "slot_of_expert": (lora.slot_of_expert.shape, (num_experts,)),
    }
    hint = f"A is (slots, rank, {widths[0]}), B is (slots, {widths[1]}, rank), one slot per trained expert"
    return [
        Problem(f"{name} factor {factor}", f"must have the shape {shape}", hint, tuple(got))
        for factor, (got, shape) in expected.items()
        if tuple(got) != shape
    ]
