"""Adapters as llama.cpp reads them: one GGUF with lora_a and lora_b per tensor, a whole bank of experts in one."""

from __future__ import annotations

from functools import partial

import torch

from finetune.architecture.family import Family
from finetune.architecture.names import MLP_PROJECTIONS
from finetune.architecture.registry import FAMILIES
from finetune.errors import AdapterError, Problem
from finetune.formats.factors import Factors
from finetune.formats.gguf_file import GgufTensor, plan_gguf, tensor_name
from finetune.io.stream import OutputFile, Place
from finetune.models.tensor_file import TORCH_DTYPES

FILE = "adapter.gguf"


def plan_lora(factors: Factors, dtype: str) -> OutputFile:
    """The adapter's file. llama.cpp multiplies B A with alpha / rank, for one alpha and the rank of each tensor.

    dtype: F32 or F16. Raises AdapterError for bfloat16, and for weights llama.cpp has no place for.
    """
    where = str(factors.plan.adapters[0].path)
    if dtype == "BF16":
        raise AdapterError(Problem(where, "llama.cpp takes factors as fp32 or fp16", "use --dtype fp32", dtype))
    ranks = set(factors.ranks.values())
    alpha = 1.0
    if factors.scale is not None and len(ranks) == 1:
        alpha = factors.scale * factors.max_rank
    tensors: list[GgufTensor] = []
    for module in factors.plain:
        rank = factors.ranks[f"{module}.weight"]
        out, width = factors.shape(module)
        tensors += _pair(factors, [module], rank, alpha, dtype, ((rank, width), (out, rank)))
    for bank in factors.banks:
        for matrix in MLP_PROJECTIONS:
            modules = factors.expert_modules(bank, matrix)
            rank = max(factors.ranks.get(f"{module}.weight", 0) for module in modules)
            if rank:
                out, width = factors.shape(modules[0])
                experts = factors.num_experts
                sizes = (experts, rank, width), (experts, out, rank)
                tensors += _pair(factors, modules, rank, alpha, dtype, sizes)
    settings = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        "general.name": factors.plan.adapters[0].path.name,
    }
    return plan_gguf(FILE, _family(factors).gguf or "", settings, tensors)


def _family(factors: Factors) -> Family:
    return FAMILIES[factors.plan.shape.model_type]


def _pair(
    factors: Factors, modules: list[str], rank: int, alpha: float, dtype: str, sizes: tuple[tuple[int, ...], ...]
) -> list[GgufTensor]:
    """lora_a and lora_b of one module, or of all experts of a bank stacked."""

    def fill(side: int, place: Place) -> None:
        for module in modules:
            values = factors.padded(module, rank, fold=alpha / rank)[side].to(TORCH_DTYPES[dtype])
            if not torch.isfinite(values).all():
                hint = "its values do not fit the dtype: use --dtype fp32"
                raise AdapterError(Problem(module, f"is not finite as {dtype}", hint))
            place.append(values)

    name = tensor_name(f"{modules[0]}.weight", _family(factors))
    return [
        GgufTensor(f"{name}.lora_{letter}", dtype, size, partial(fill, side), 4 * torch.Size(size).numel())
        for side, (letter, size) in enumerate(zip("ab", sizes, strict=True))
    ]
