"""The packings of expert banks in adapters made elsewhere, and how to tell one from another.

For a bank of E experts, rank R and a weight (out, in), files hold

    peft               lora_A (E*R, in), lora_B (out, R*E), column r*E + e       PEFT 0.19 and later
    peft-0.18          lora_A (E*R, out), lora_B (in, R*E): in and out swapped    PEFT before
    expert-major       lora_B with column e*R + r                                 Unsloth until September 2026
    expert-major-0.18  both

Reading one as another raises nothing and scrambles the experts. So a packing is taken only when the file tells it
(shapes that fit one alone, zero columns of untrained experts, the version) or the caller does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from finetune.adapters.layouts import b_order
from finetune.adapters.stock_config import StockConfig
from finetune.adapters.tensor_map import packs_as_now
from finetune.architecture.names import EXPERT_PROJECTIONS, EXPERTS, GATE_UP
from finetune.architecture.shape import CONFIG, shape_of
from finetune.errors import AdapterError, Problem
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import TensorFile

Packing = Literal["peft", "peft-0.18", "expert-major", "expert-major-0.18"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)


@dataclass(frozen=True)
class Bank:
    """A packed pair: names in the file, the weight (out, in) of one expert, experts and rank."""

    a_name: str
    b_name: str
    out: int
    width: int
    num_experts: int
    rank: int


def find_banks(config: StockConfig, file: TensorFile, source: Checkpoint) -> list[Bank]:
    """Every packed pair, with the shapes its weight has in the base."""
    shape = shape_of(source.config, str(source.path / CONFIG))
    hidden, wide, experts = shape.hidden, shape.expert_intermediate, shape.experts
    banks = []
    for name in file.tensors:
        for inner in (".base_layer", ""):
            ending = f".{EXPERTS}{inner}.lora_A.weight"
            if not name.endswith(ending):
                continue
            bank = f"{name.removeprefix('base_model.model.').removesuffix(ending)}.{EXPERTS}"
            targets = [key for key in EXPERT_PROJECTIONS if config.targets_parameter(f"{bank}.{key}")]
            if not targets:
                hint = "the file or its settings are incomplete"
                raise AdapterError(Problem(f"{file.path}: {name}", "is not named by target_parameters", hint))
            key = targets[0] if inner or len(targets) == 1 else targets[1]
            out, width = (2 * wide, hidden) if key == GATE_UP else (hidden, wide)
            b_name = name.replace(".lora_A.", ".lora_B.")
            if b_name not in file.tensors:
                raise AdapterError(Problem(f"{file.path}: {name}", "has no lora_B beside it", "save the adapter again"))
            banks.append(Bank(name, b_name, out, width, experts, config.rank_of(f"{bank}.{key}")))
    return banks


def recognize(config: StockConfig, file: TensorFile, banks: list[Bank], named: Packing | None) -> tuple[Packing, str]:
    """(packing, how it is known).

    named: what the caller says. Raises AdapterError where neither the file nor the caller tells, or they disagree.
    """
    swapped, by_shape = _is_swapped(config, file, banks)
    orders = {b_order(file.read(bank.b_name), bank.num_experts, bank.rank) for bank in banks} - {None}
    where = f"{file.path}"
    if len(orders) > 1:
        hint = "the file is damaged or was put together from several: ask who made it"
        raise AdapterError(Problem(where, "its banks have zero columns that belong to different packings", hint))
    if named is not None:
        order = "expert-major" if named.startswith("expert-major") else "expert-fastest"
        if orders and order not in orders:
            hint = f"the columns of untrained experts say {orders.pop()}"
            raise AdapterError(Problem("--packing", "contradicts the file", hint, named))
        if by_shape and named.endswith("0.18") != swapped:
            hint = f"by its shapes, in and out are {'swapped' if swapped else 'not swapped'}"
            raise AdapterError(Problem("--packing", "contradicts the file", hint, named))
        return named, "as declared"
    hint = f"declare it with --packing, one of {', '.join(PACKINGS)}: ask whoever made the adapter"
    if not by_shape and not packs_as_now(config.peft_version):
        what = "does not tell whether in and out are swapped, as in PEFT before 0.19"
        raise AdapterError(Problem(f"{config.path}: peft_version", what, hint, config.peft_version))
    reasons = ["by its shapes" if by_shape else f"by PEFT {config.peft_version}"]
    if orders:
        reasons.append("by the zero columns of untrained experts")
    elif config.by_unsloth:
        raise AdapterError(Problem(where, "is by Unsloth and does not tell the order of the columns of lora_B", hint))
    name = orders.pop() if orders else "expert-fastest"
    found = {("expert-fastest", False): 0, ("expert-fastest", True): 1, ("expert-major", False): 2}
    return PACKINGS[found.get((str(name), swapped), 3)], " and ".join(reasons)


def _is_swapped(config: StockConfig, file: TensorFile, banks: list[Bank]) -> tuple[bool, bool]:
    """(whether in and out are swapped, whether the shapes alone say so)."""
    fits = {False: True, True: True}
    for bank in banks:
        rows = bank.num_experts * bank.rank
        shapes = file.tensors[bank.a_name].shape, file.tensors[bank.b_name].shape
        fits[False] &= shapes == ((rows, bank.width), (bank.out, rows))
        fits[True] &= shapes == ((rows, bank.out), (bank.width, rows))
        if not any(fits.values()):
            wanted = f"[{rows}, {bank.width}] and [{bank.out}, {rows}], nor swapped"
            hint = "the adapter is for another base, or its settings (r, rank_pattern) are not its own"
            what = f"its pair is not {wanted}"
            raise AdapterError(Problem(f"{file.path}: {bank.a_name}", what, hint, [list(shape) for shape in shapes]))
    if all(fits.values()):
        return not packs_as_now(config.peft_version), False
    return fits[True], True


def repack(file: TensorFile, bank: Bank, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (E*R, in) and lora_B (out, R*E), expert fastest."""
    experts, rank = bank.num_experts, bank.rank
    a, b = file.read(bank.a_name), file.read(bank.b_name)
    a_ERI = a.reshape(experts, rank, -1)
    if packing.startswith("expert-major"):
        b_EOR = b.reshape(b.shape[0], experts, rank).permute(1, 0, 2)
    else:
        b_EOR = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    if packing.endswith("0.18"):
        a_ERI, b_EOR = b_EOR.transpose(1, 2), a_ERI.transpose(1, 2)
    return a_ERI.reshape(experts * rank, -1), b_EOR.permute(1, 2, 0).reshape(-1, rank * experts)
