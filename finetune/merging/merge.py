"""Merge, the whole of it: plan, stream the shards, copy the side files, put the folder in place."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from finetune.adapters.card import CARD
from finetune.config.model_files import GENERATION_CONFIG
from finetune.config.rope import with_scaling
from finetune.errors import Problem, UserError
from finetune.io.dtypes import CONFIG_DTYPES, SAFETENSORS_DTYPES, StorageDtype
from finetune.io.folder import Progress, Work, describe_job, side_contents, write_folder
from finetune.io.sizes import size_text
from finetune.merging.card import merged_card
from finetune.merging.packed_base import MergeOnto, QuantizationError, quantization_errors
from finetune.merging.packed_base import advice as advice_on_base
from finetune.merging.plan import Adapters, MergePlan, generation_config, plan_merge, taught_ends
from finetune.merging.retention import Retention, Tally, advice
from finetune.merging.shards import num_bytes, plan_files, reports_by_weight, stored_dtypes
from finetune.models.checkpoint import CONFIG, INDEX
from finetune.reports.tables import Shown, table, warnings


@dataclass(frozen=True)
class MergeReport(Shown):
    """What a merge did.

    dtype: what --dtype asked for, None when each tensor kept its own.  tensors_converted: tensors without a delta that
    only changed their dtype.  retention: per family of weights, what rounding left of the delta.
    quantization: per family of weights that the run had packed, how much that changed them; empty for a base in 16 bit.
    """

    output: Path
    base: Path
    adapters: tuple[Path, ...]
    dtype: str | None
    tensors_changed: int
    tensors_copied: int
    tensors_converted: int
    bytes_written: int
    elapsed_s: float
    retention: dict[str, Retention]
    quantization: dict[str, QuantizationError]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        paths = {"output": str(self.output), "base": str(self.base), "adapters": [str(path) for path in self.adapters]}
        return {**asdict(self), **paths, "warnings": list(self.warnings)}

    def render(self) -> Group:
        """What was written, how much of the delta survived rounding in each family, and the warnings."""
        size, dtype = size_text(self.bytes_written), self.dtype or "dtype of the base"
        facts = (
            f"{self.output}: {size} in {self.elapsed_s:.1f} s, {dtype}; tensors: {self.tensors_changed:,} "
            f"changed, {self.tensors_copied:,} copied, {self.tensors_converted:,} converted"
        )
        rows = table("delta kept after rounding", "family", "tensors", "kept", "cosine", "weights unchanged")
        for family, kept in self.retention.items():
            share = f"{kept.unchanged_share:.1%}"
            rows.add_row(family, f"{kept.tensors:,}", f"{kept.ratio:.1%}", f"{kept.cosine:.4f}", share)
        return Group(Text(facts), rows, *self._quantization(), *warnings(self.warnings))

    def _quantization(self) -> list[Table]:
        if not self.quantization:
            return []
        rows = table("what packing did to the weights", "family", "measured", "|error| / |W|", "|delta| / |W|", "ratio")
        for family, found in self.quantization.items():
            rows.add_row(family, str(found.measured), f"{found.error:.2%}", f"{found.delta:.2%}", f"{found.ratio:.2f}")
        return [rows]


def merge(
    adapters: Adapters,
    output: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: StorageDtype | None = None,
    onto: MergeOnto = "original",
    resume: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes base + adapter as a checkpoint with the base's keys, shards and side files.

    adapters: a saved adapter, or several whose deltas are added.  output: a folder to make; it appears only when it is
    complete.  base: folder or cached hub name, where the adapter says it is when None.
    weights: what the delta of each adapter is multiplied with, 1 when None.
    dtype: storage of all weights, each tensor's own when None; then tensors without a delta keep their bytes.
    onto: for the adapter of a packed model, add it to the weights as they are stored, or as the run saw them.
    resume: go on after the last shard that a killed merge of the same inputs finished.
    progress: called with (shard, bytes read so far, bytes in all).
    Raises AdapterError, ModelError or UserError before the first byte is written if anything does not fit.
    """
    if dtype is not None and dtype not in SAFETENSORS_DTYPES:
        what = f"is none of {', '.join(SAFETENSORS_DTYPES)}"
        raise UserError(Problem("--dtype", what, "leave it out to keep the dtype", dtype))
    started = time.perf_counter()
    output = Path(output).absolute()
    plan = plan_merge(adapters, base, weights, onto)
    if onto == "dequantized" and plan.base.fp8_block is not None and dtype is None:
        hint = "give --dtype bf16"
        raise UserError(Problem("--onto", "dequantized weights would be rounded to the base's FP8", hint))
    kept = SAFETENSORS_DTYPES[dtype] if dtype else None
    stored, files = stored_dtypes(plan, kept), plan_files(plan, kept)
    config = with_scaling((plan.base.path / CONFIG).read_bytes(), plan.rope_scaling)
    side = side_contents(plan.base, CONFIG_DTYPES[dtype] if dtype else None, config)
    side |= {CARD: merged_card(plan, dtype).encode()} | _index(plan, stored)
    ends = taught_ends(plan)
    if ends:
        side[GENERATION_CONFIG] = generation_config(plan, ends)
    job = describe_job("merge", dtype, list(plan.shares), onto, folders=[plan.base.path, *plan.paths])
    reported = reports_by_weight(write_folder(Work(output, plan.base, tuple(files), side, job, resume), progress))
    return _report(plan, output, dtype, stored, reported, time.perf_counter() - started, ends)


def _index(plan: MergePlan, stored: dict[str, str]) -> dict[str, bytes]:
    """The base's index, byte for byte where all dtypes stay as they are."""
    base = plan.base
    if base.index is None:
        return {}
    if all(base.tensors[name].dtype == dtype for name, dtype in stored.items()) and len(stored) == len(base.tensors):
        return {INDEX: (base.path / INDEX).read_bytes()}
    metadata = {**(base.index.get("metadata") or {}), "total_size": num_bytes(plan, stored)}
    held = {name for file in base.files.values() for name, each in file.stored.items() if each.parts[0] in stored}
    weight_map = {name: shard for name, shard in base.index["weight_map"].items() if name in held}
    content = json.dumps({**base.index, "metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False)
    return {INDEX: (content + "\n").encode()}


def _report(
    plan: MergePlan,
    output: Path,
    dtype: str | None,
    stored: dict[str, str],
    reported: dict[str, Any],
    elapsed_s: float,
    ends: dict[int, str],
) -> MergeReport:
    tallies: dict[str, Tally] = {}
    for name in plan.base.tensors:
        if reported.get(name) is not None:
            tallies.setdefault(plan.kinds[name], Tally()).merge(Tally.from_dict(reported[name]))
    retention = {family: tallies[family].retention() for family in sorted(tallies)}
    changed = {name for name, tally in reported.items() if tally is not None}
    changed |= {name for name in stored if plan.remakes(name)}
    changed |= {scales for scales, name in plan.scales.items() if name in changed and scales in stored}
    converted = sum(plan.base.tensors[name].dtype != kept for name, kept in stored.items() if name not in changed)
    quantization = quantization_errors(plan)
    notices = [*plan.warnings, *advice(retention), *advice_on_base(quantization, plan.base)]
    if ends:
        named = ", ".join(f"{text} ({token})" for token, text in ends.items())
        notices.append(
            f"{GENERATION_CONFIG} names {named}, which training taught as the end and where the base goes on"
        )
    if not changed:
        notices.append("every delta is zero: the output equals the base")
    if converted:
        notices.append(f"{converted} tensors without a delta were converted to {dtype} as well")
    return MergeReport(
        output=output,
        base=plan.base.path,
        adapters=plan.paths,
        dtype=dtype,
        tensors_changed=len(changed),
        tensors_copied=len(stored) - len(changed) - converted,
        tensors_converted=converted,
        bytes_written=sum(file.stat().st_size for file in output.iterdir()),
        elapsed_s=elapsed_s,
        retention=retention,
        quantization=quantization,
        warnings=tuple(notices),
    )
