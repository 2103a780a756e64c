"""The one function of this room: the expert MLP with LoRA, and the only place that chooses how it is computed."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import AdapterError, Problem
from finetune.kernels import reference, torch_path
from finetune.kernels.layer import Dropout, ExpertLayer, Factors, PackedStack, Stack

__all__ = ["Backend", "Dropout", "Factors", "PackedStack", "expert_mlp"]

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("reference", "torch")

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
    dropout: on what the factors read.
    backend: `reference` (readable, slow), `torch` (any device), `triton` (not there yet), `auto`.
    recompute: save x alone for backward and compute gate_up again there.

    Raises AdapterError for shapes that do not fit, experts that require gradients, or a backend that cannot run.
    """
    layer = ExpertLayer(gate_up_EGH, down_EHI, gate_up_lora, down_lora, dropout)
    problems = _problems(x_TH, top_k_index_TK, top_k_weights_TK, layer)
    if problems:
        raise AdapterError(*problems)
    if _choose(backend) == "reference":
        return reference.expert_mlp(x_TH, top_k_index_TK, top_k_weights_TK, layer)
    return torch_path.expert_mlp(x_TH, top_k_index_TK, top_k_weights_TK, layer, recompute)


def _choose(backend: Backend) -> str:
    if backend == "auto":
        return _log_once("torch")
    if backend not in BACKENDS:
        hint = f"use one of {', '.join(BACKENDS)}, or auto"
        raise AdapterError(Problem("backend", "cannot run here", hint, backend))
    return backend


@cache
def _log_once(backend: str) -> str:
    logger.info("expert MLP runs on the %s backend", backend)
    return backend


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
    problems += _factor_problems("gate_up", layer.gate_up_lora, num_experts, (hidden, 2 * intermediate))
    return problems + _factor_problems("down", layer.down_lora, num_experts, (intermediate, hidden))


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
