"""Adapters as PEFT and the servers read them: which tensors the file has, and what fills each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from finetune.adapters.files import WEIGHTS
from finetune.adapters.layouts import pack_a, pack_b
from finetune.architecture.names import (
    DOWN,
    EXPERT_MATRICES,
    GATE_UP,
    MLP_PROJECTIONS,
    expert_module,
    in_attention,
    in_mlp,
    is_router,
)
from finetune.errors import AdapterError, Problem
from finetune.formats.factors import Factors
from finetune.formats.format import Planned
from finetune.formats.peft_settings import as_number, exact_pattern, module_targets, parameter_targets, settings_file
from finetune.io.safetensors_file import Tensor, plan_file
from finetune.io.stream import Place
from finetune.models.tensor_file import TORCH_DTYPES

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

Pack = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def per_expert(factors: Factors, dtype: str, *, served: bool) -> tuple[list[Tensor], dict[str, bytes]]:
    """One pair per expert and projection; a bank that has any factors has all of them, zero where there were none.

    served: for vLLM and SGLang, which know one rank and one scale: every rank is padded to one they accept and the
    scale is folded into B, so that alpha = rank. Otherwise ranks are padded to the largest.
    """
    rank = _served_rank(factors) if served else factors.max_rank
    scale = 1.0 if served or factors.scale is None else factors.scale
    modules = [*factors.plain]
    for bank in factors.banks:
        modules += [module for matrix in MLP_PROJECTIONS for module in factors.expert_modules(bank, matrix)]
    if served:
        _check_served(factors)
    tensors = [
        tensor
        for module in modules
        for tensor in _pair(
            module, partial(factors.padded, module, rank, fold=scale), dtype, _sizes(factors, module, rank)
        )
    ]
    content = {"r": rank, "lora_alpha": as_number(scale * rank), "target_modules": module_targets(factors, modules)}
    return tensors, settings_file(factors, content)


def plan_weights(tensors: list[Tensor], side: dict[str, bytes], facts: dict[str, int]) -> Planned:
    """The adapter's file and its settings. facts: those that are 0 are left out."""
    file = plan_file(WEIGHTS, tensors, {"format": "pt"})
    return Planned((file,), {**side}, {name: value for name, value in facts.items() if value})


def fused(factors: Factors, dtype: str) -> tuple[list[Tensor], dict[str, bytes]]:
    """PEFT's packing of expert banks (0.19 and later), plain pairs for the rest.

    Gate and up with different A become one pair of twice the rank, which says the same.
    """
    scale, rank = factors.scale if factors.scale is not None else 1.0, factors.max_rank
    tensors: list[Tensor] = []
    rank_pattern: dict[str, int] = {}
    for module in factors.plain:
        own = factors.ranks[f"{module}.weight"]
        rank_pattern[exact_pattern(module)] = own
        tensors += _pair(module, partial(factors.padded, module, own, fold=scale), dtype, _sizes(factors, module, own))
    as_parameters = [module for module in factors.plain if _is_parameter(factors, module)]
    targets = module_targets(factors, [module for module in factors.plain if module not in as_parameters])
    parameters = [f"{module}.weight" for module in as_parameters]
    for bank in factors.banks:
        shared = factors.shares_gate_and_up(bank)
        levels = _levels(factors, bank, shared=shared)
        parameters += [f"{bank}.{parameter}" for parameter in levels]
        for parameter, own in levels.items():
            nested = len(levels) == 2 and parameter == GATE_UP
            matrices = EXPERT_MATRICES[parameter]
            out, width = factors.shape(expert_module(bank, 0, matrices[0]))
            out *= len(matrices)
            sizes = (own * factors.num_experts, width), (out, own * factors.num_experts)
            expert = partial(_expert_pair, factors, parameter, own, scale, shared)
            pack = partial(_pack_bank, [f"{bank}.{number}" for number in range(factors.num_experts)], expert)
            tensors += _pair(f"{bank}.base_layer" if nested else bank, pack, dtype, sizes)
            rank_pattern[exact_pattern(f"{bank}.{parameter}")] = own
    rank_pattern = {name: own for name, own in rank_pattern.items() if own != rank}
    content: dict[str, Any] = {
        "r": rank,
        "lora_alpha": as_number(scale * rank),
        "rank_pattern": rank_pattern,
        "alpha_pattern": {name: as_number(scale * own) for name, own in rank_pattern.items()},
        "target_modules": targets,
        "target_parameters": parameter_targets(factors, parameters) or None,
    }
    return tensors, settings_file(factors, content)


def _levels(factors: Factors, bank: str, *, shared: bool) -> dict[str, int]:
    """Fused parameters of a bank that have factors -> the rank of their packed pair."""
    ranks: dict[str, int] = {
        matrix: max((factors.ranks.get(f"{m}.weight", 0) for m in factors.expert_modules(bank, matrix)), default=0)
        for matrix in MLP_PROJECTIONS
    }
    levels = {}
    for parameter, matrices in EXPERT_MATRICES.items():
        together = [ranks[matrix] for matrix in matrices]
        if any(together):
            levels[parameter] = max(together) if shared else sum(together)
    return levels


def _pack_bank(
    experts: list[str], pair: Callable[[str], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    a_ERI, b_EOR = (torch.stack(side) for side in zip(*map(pair, experts), strict=True))
    slots = range(len(experts))
    return pack_a(a_ERI, slots, len(experts)), pack_b(b_EOR, slots, len(experts))


def _expert_pair(
    factors: Factors, parameter: str, rank: int, scale: float, shared: bool, expert: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one expert in a bank; gate and up as one, with an A in common (`shared`) or one below the other."""
    modules = [f"{expert}.{matrix}" for matrix in EXPERT_MATRICES[parameter]]
    if parameter == DOWN:
        return factors.padded(modules[0], rank, fold=scale)
    (gate_a, gate_b), (up_a, up_b) = (factors.padded(module, rank, fold=scale) for module in modules)
    if shared:
        return gate_a, torch.cat([gate_b, up_b])
    own = factors.ranks.get(f"{modules[0]}.weight", 0)
    a_RI, b_OR = gate_a, torch.cat([gate_b, torch.zeros_like(up_b)])
    a_RI[own:] = up_a[: rank - own]
    b_OR[len(gate_b) :, own:] = up_b[:, : rank - own]
    return a_RI, b_OR


def _pair(module: str, pack: Pack, dtype: str, sizes: tuple[tuple[int, int], tuple[int, int]]) -> list[Tensor]:
    def fill(side: int, place: Place) -> None:
        place.append(_finite(module, pack()[side].to(TORCH_DTYPES[dtype])))

    return [
        Tensor(
            f"base_model.model.{module}.lora_{letter}.weight", dtype, size, partial(fill, side), size[0] * size[1] * 4
        )
        for side, (letter, size) in enumerate(zip("AB", sizes, strict=True))
    ]


def _finite(module: str, values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        hint = "its values do not fit the dtype: use --dtype fp32 or bf16"
        raise AdapterError(Problem(module, f"is not finite as {values.dtype}", hint))
    return values


def _sizes(factors: Factors, module: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    out, width = factors.shape(module)
    return (rank, width), (out, rank)


def _served_rank(factors: Factors) -> int:
    fitting = [rank for rank in SERVED_RANKS if rank >= factors.max_rank]
    if not fitting:
        hint = "merge it and serve the merged model"
        what = f"has rank {factors.max_rank}, and the servers take at most {SERVED_RANKS[-1]}"
        raise AdapterError(Problem(str(factors.plan.adapters[0].path), what, hint))
    return fitting[0]


def _check_served(factors: Factors) -> None:
    odd = [module for module in factors.plain if not in_attention(module) and not module.endswith(MLP_PROJECTIONS)]
    if odd:
        hint = "merge it and serve the merged model"
        what = f"changes {odd[0]}, which the servers do not apply adapters to"
        raise AdapterError(Problem(str(factors.plan.adapters[0].path), what, hint))


def _is_parameter(factors: Factors, module: str) -> bool:
    """Whether PEFT wraps it as a parameter: the router, and the dense MLPs of a mixture of experts."""
    return is_router(module) or (factors.num_experts > 0 and in_mlp(module))
