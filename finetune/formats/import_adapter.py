"""`finetune import-adapter`: adapters made elsewhere, as PEFT packs them now, which every command here takes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from finetune.adapters.files import WEIGHTS
from finetune.adapters.sidecar import check_files
from finetune.adapters.stock_config import ADAPTER_CONFIG, StockConfig, read_json_object
from finetune.errors import AdapterError, Problem, UserError
from finetune.formats import peft_files
from finetune.formats.factors import Factors
from finetune.formats.packing import PACKINGS, Bank, Packing, find_banks, recognize, repack
from finetune.formats.peft_settings import PEFT_VERSION
from finetune.io.folder import Work, check_output, describe_job, write_folder
from finetune.io.safetensors_file import Tensor, plan_file
from finetune.io.stream import Place
from finetune.merging.plan import plan_merge, refuse_packed
from finetune.models.checkpoint import Checkpoint, find_checkpoint
from finetune.models.tensor_file import TensorFile
from finetune.reports.tables import Shown, warnings


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


def import_adapter(
    adapter: str | Path, output: str | Path, *, packing: Packing | None = None, base: str | Path | None = None
) -> ImportReport:
    """Writes the adapter as PEFT 0.19 and later have it, which every command here takes.

    adapter: a folder with PEFT's files: banks of experts in any packing above, or factors per expert.
    packing: how banks are packed; only needed where the file does not tell.
    base: as for `merge`.
    Raises AdapterError when the file does not show the packing or contradicts `packing`, or when the adapter does not
    fit the base.
    """
    if packing is not None and packing not in PACKINGS:
        raise UserError(Problem("--packing", f"is none of {', '.join(PACKINGS)}", "name one of them", packing))
    started = time.perf_counter()
    adapter, output = Path(adapter), Path(output).absolute()
    check_files(adapter)
    config = StockConfig.open(adapter)
    file = TensorFile.open(adapter / WEIGHTS, error=AdapterError)
    named = base or config.base_model
    if not named:
        where = f"{config.path}: base_model_name_or_path"
        raise AdapterError(Problem(where, "does not say which base model it is for", "name the base with --base"))
    source = Checkpoint.open(find_checkpoint(named, option="--base"))
    refuse_packed(source, "name that model: --base {base}")
    check_output(output, source)
    banks = find_banks(config, file, source)
    if packing is not None and not banks:
        what = "has no meaning for an adapter without banks of experts"
        raise UserError(Problem("--packing", what, "leave it out: there is one way to store the rest", packing))
    known_by = "not needed"
    if banks:
        packing, known_by = recognize(config, file, banks, packing)
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


def _repacked(
    adapter: Path, file: TensorFile, banks: list[Bank], packing: Packing
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
    settings |= {"peft_version": PEFT_VERSION, "auto_mapping": None}
    return tensors, {ADAPTER_CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()}


def _fill(file: TensorFile, name: str, bank: Bank | None, side: int, packing: Packing, place: Place) -> None:
    place.append(file.read(name) if bank is None else repack(file, bank, packing)[side])
