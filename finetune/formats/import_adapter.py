"""`finetune import-adapter`: adapters made elsewhere, with expert banks packed in other ways, as PEFT packs them now.

For a bank of E experts, rank R and a weight (out, in), files hold

    peft               lora_A (E*R, in), lora_B (out, R*E), column r*E + e       PEFT 0.19 and later
    peft-0.18          lora_A (E*R, out), lora_B (in, R*E): in and out swapped    PEFT before
    expert-major       lora_B with column e*R + r                                 Unsloth until September 2026
    expert-major-0.18  both

Reading one as another raises nothing and scrambles the experts. So a packing is taken only when the file tells it
(shapes that fit one alone, zero columns of untrained experts, the version) or the caller does.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group
from rich.text import Text

from finetune.adapters.files import WEIGHTS
from finetune.adapters.layouts import b_order
from finetune.adapters.stock_config import ADAPTER_CONFIG, StockConfig, read_json_object
from finetune.adapters.tensor_map import packs_as_now
from finetune.architecture.names import EXPERT_PROJECTIONS, EXPERTS, GATE_UP
from finetune.architecture.shape import CONFIG, shape_of
from finetune.errors import AdapterError, Problem, UserError
from finetune.formats import peft_files
from finetune.formats.factors import Factors
from finetune.io.folder import Work, check_output, describe_job, write_folder
from finetune.io.safetensors_file import Tensor, plan_file
from finetune.io.show import Shown, warnings
from finetune.io.stream import Place
from finetune.merging.plan import plan_merge, refuse_packed
from finetune.models.checkpoint import Checkpoint, find_checkpoint
from finetune.models.tensor_file import TensorFile

Packing = Literal["peft", "peft-0.18", "expert-major", "expert-major-0.18"]
PACKINGS: tuple[Packing, ...] = ("peft", "peft-0.18", "expert-major", "expert-major-0.18")
_VERSION = "0.21.2"


@dataclass(frozen=True)
class ImportReport(Shown):
    """What was read, and how it was known: packing is None for an adapter without banks of experts."""

    output: Path
    source: Path
    packing: str | None
    known_by: str
    tensors: int
    elapsed_s: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        paths = {"output": str(self.output), "source": str(self.source)}
        return {**asdict(self), **paths, "warnings": list(self.warnings)}

    def render(self) -> Group:
        """One line, and the warnings."""
        packing = f"experts packed as {self.packing}" if self.packing else "no expert banks"
        text = f"{self.output}: {self.tensors:,} tensors; {packing} ({self.known_by})"
        return Group(Text(text), *warnings(self.warnings))


@dataclass(frozen=True)
class _Bank:
    """A packed pair: names in the file, the weight (out, in) of one expert, experts and rank."""

    a_name: str
    b_name: str
    out: int
    width: int
    num_experts: int
    rank: int


def import_adapter(
    adapter: str | Path, output: str | Path, *, packing: Packing | None = None, base: str | Path | None = None
) -> ImportReport:
    """Writes the adapter as PEFT 0.19 and later have it, which every command here takes.

    adapter: a folder with PEFT's files: banks of experts in any packing above, or factors per expert.
    packing: how banks are packed; only needed where the file does not tell.
    base: as for `merge`.
    Raises AdapterError when the packing is not told by the file or contradicts `packing`, or when the adapter does not
    fit the base.
    """
    if packing is not None and packing not in PACKINGS:
        raise UserError(Problem("--packing", f"is none of {', '.join(PACKINGS)}", "name one of them", packing))
    started = time.perf_counter()
    adapter, output = Path(adapter), Path(output).absolute()
    config = StockConfig.open(adapter)
    file = TensorFile.open(adapter / WEIGHTS, error=AdapterError)
    named = base or config.base_model
    if not named:
        where = f"{config.path}: base_model_name_or_path"
        raise AdapterError(Problem(where, "does not say which base model it is for", "name the base with --base"))
    source = Checkpoint.open(find_checkpoint(named, option="--base"))
    refuse_packed(source, "name that model: --base {base}")
    check_output(output, source)
    banks = _find_banks(config, file, source)
    if packing is not None and not banks:
        what = "has no meaning for an adapter without banks of experts"
        raise UserError(Problem("--packing", what, "leave it out: there is one way to store the rest", packing))
    known_by = "not needed"
    if banks:
        packing, known_by = _packing(config, file, banks, packing)
        tensors, side = _repacked(adapter, file, banks, packing)
    else:
        factors = Factors.of(plan_merge(adapter, base))
        tensors, side = peft_files.fused(factors, "F32")
    job = describe_job("import", packing, folders=[adapter, source.path])
    write_folder(Work(output, source, (plan_file(WEIGHTS, tensors, {"format": "pt"}),), {**side}, job))
    try:
        plan = plan_merge(output, base)  # reads it back, and checks that it fits
    except UserError:
        shutil.rmtree(output)
        raise
    elapsed_s = time.perf_counter() - started
    return ImportReport(output, adapter, packing if banks else None, known_by, len(tensors), elapsed_s, plan.warnings)


def _find_banks(config: StockConfig, file: TensorFile, source: Checkpoint) -> list[_Bank]:
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
            banks.append(_Bank(name, b_name, out, width, experts, config.rank_of(f"{bank}.{key}")))
    return banks


def _packing(config: StockConfig, file: TensorFile, banks: list[_Bank], told: Packing | None) -> tuple[Packing, str]:
    """(packing, how it is known)."""
    swapped, by_shape = _is_swapped(config, file, banks)
    orders = {b_order(file.read(bank.b_name), bank.num_experts, bank.rank) for bank in banks} - {None}
    where = f"{file.path}"
    if len(orders) > 1:
        hint = "the file is damaged or was put together from several: ask who made it"
        raise AdapterError(Problem(where, "its banks have zero columns that belong to different packings", hint))
    if told is not None:
        order = "expert-major" if told.startswith("expert-major") else "expert-fastest"
        if orders and order not in orders:
            hint = f"the columns of untrained experts say {orders.pop()}"
            raise AdapterError(Problem("--packing", "contradicts the file", hint, told))
        if by_shape and told.endswith("0.18") != swapped:
            hint = f"by its shapes, in and out are {'swapped' if swapped else 'not swapped'}"
            raise AdapterError(Problem("--packing", "contradicts the file", hint, told))
        return told, "as declared"
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


def _is_swapped(config: StockConfig, file: TensorFile, banks: list[_Bank]) -> tuple[bool, bool]:
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


def _repacked(
    adapter: Path, file: TensorFile, banks: list[_Bank], packing: Packing
) -> tuple[list[Tensor], dict[str, bytes]]:
    by_name = {name: (bank, side) for bank in banks for side, name in enumerate((bank.a_name, bank.b_name))}
    tensors = []
    for name, info in file.tensors.items():
        shape, fill = info.shape, partial(_fill, file, name, None, 0, packing)
        if name in by_name:
            bank, side = by_name[name]
            rows = bank.num_experts * bank.rank
            shape = (bank.out, rows) if side else (rows, bank.width)
            fill = partial(_fill, file, name, bank, side, packing)
        tensors.append(Tensor(name, info.dtype, shape, fill, info.num_bytes))
    settings = read_json_object(adapter / ADAPTER_CONFIG)
    settings |= {"peft_version": _VERSION, "auto_mapping": None}
    return tensors, {ADAPTER_CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()}


def _fill(file: TensorFile, name: str, bank: _Bank | None, side: int, packing: Packing, place: Place) -> None:
    place.append(file.read(name) if bank is None else repack(file, bank, packing)[side])


def repack(file: TensorFile, bank: _Bank, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
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
