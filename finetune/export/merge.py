"""Merge, the whole of it: plan, stream the shards, copy the side files, put the folder in place."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.text import Text

from finetune.errors import Problem, UserError
from finetune.export.plan import MergePlan, plan_merge
from finetune.export.retention import Retention, advice
from finetune.export.shards import Counts, ShardWriter, output_bytes
from finetune.export.show import Shown, table, warnings
from finetune.export.workers import exact_workers
from finetune.models.checkpoint import CONFIG, INDEX, Checkpoint
from finetune.models.files import check_target, finished_folder, write_atomic

Progress = Callable[[str, int, int], None]
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
CONFIG_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SPARE_BYTES = 2**26


@dataclass(frozen=True)
class MergeReport(Shown):
    """What a merge did.

    dtype: what --dtype asked for, None when each tensor kept its own.  tensors_converted: tensors without a delta that
    only changed their dtype.  retention: per family of weights, what rounding left of the delta.
    """

    output: Path
    base: Path
    adapter: Path
    dtype: str | None
    tensors_changed: int
    tensors_copied: int
    tensors_converted: int
    bytes_written: int
    elapsed_s: float
    retention: dict[str, Retention]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        paths = {name: str(getattr(self, name)) for name in ("output", "base", "adapter")}
        return {**asdict(self), **paths, "warnings": list(self.warnings)}

    def render(self) -> Group:
        """What was written, how much of the delta survived rounding in each family, and the warnings."""
        gib, dtype = self.bytes_written / 2**30, self.dtype or "dtype of the base"
        facts = (
            f"{self.output}: {gib:.2f} GiB in {self.elapsed_s:.1f} s, {dtype}; tensors: {self.tensors_changed:,} "
            f"changed, {self.tensors_copied:,} copied, {self.tensors_converted:,} converted"
        )
        rows = table("delta kept after rounding", "family", "tensors", "kept", "cosine", "weights unchanged")
        for family, kept in self.retention.items():
            share = f"{kept.unchanged_share:.1%}"
            rows.add_row(family, f"{kept.tensors:,}", f"{kept.ratio:.1%}", f"{kept.cosine:.4f}", share)
        return Group(Text(facts), rows, *warnings(self.warnings))


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes base + adapter as a checkpoint with the base's keys, shards and side files.

    adapter: a saved adapter.  output: a folder to make; it appears only when it is complete.
    base: folder or cached hub name, where the adapter says it is when None.
    dtype: storage of all weights, each tensor's own when None; then tensors without a delta keep their bytes.
    progress: called with (shard, bytes read so far, bytes in all).
    Raises AdapterError, ModelError or UserError before the first byte is written if anything does not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(Problem("--dtype", f"is none of {', '.join(DTYPES)}", "leave it out to keep the dtype", dtype))
    started = time.perf_counter()
    output = Path(output).absolute()
    plan = plan_merge(adapter, base)
    stored = DTYPES[dtype] if dtype else None
    check_output(output, plan.base)
    _check_space(output, plan.base, stored)
    counts = Counts()
    with finished_folder(output) as folder, exact_workers() as workers:
        writer = ShardWriter(plan, stored, workers, counts, _progress(progress, plan.base))
        for shard in plan.base.shards:
            writer.write(shard, folder / shard)
        _write_side_files(plan.base, folder, dtype)
        _write_index(plan.base, folder, stored)
    return _report(plan, output, dtype, counts, time.perf_counter() - started)


def check_output(output: Path, base: Checkpoint) -> None:
    """Raises UserError unless `output` is free, and neither the base nor inside it."""
    check_target(output)
    inside, outside = output.resolve(), base.path.resolve()
    if inside.is_relative_to(outside):
        raise UserError(Problem(str(output), "lies in the base model's folder", "name a folder outside of it"))


def _check_space(output: Path, base: Checkpoint, stored: str | None) -> None:
    side = sum((base.path / name).stat().st_size for name in base.side_files)
    needed = side + sum(file.data_start + output_bytes(file, stored) for file in base.files.values())
    existing = next(parent for parent in output.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        what = f"needs {needed / 2**30:.2f} GiB on this disk, where there are {free / 2**30:.2f}"
        raise UserError(Problem(str(output), what, "free some space, or name a folder on another disk"))


def _write_side_files(base: Checkpoint, folder: Path, dtype: str | None) -> None:
    for name in base.side_files:
        if name != CONFIG:
            shutil.copyfile(base.path / name, folder / name)
            _sync(folder / name)
    text = (base.path / CONFIG).read_bytes()
    write_atomic(folder / CONFIG, with_dtype(text, CONFIG_DTYPES[dtype]) if dtype else text)


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with its dtype replaced and every other byte as it was; unchanged where it names no dtype."""
    before = json.loads(config)
    for match in re.finditer(rb'"(torch_dtype|dtype)"\s*:\s*("[^"]*"|null)', config):
        key = match[1].decode()
        after = config[: match.start(2)] + json.dumps(dtype).encode() + config[match.end(2) :]
        if key in before and json.loads(after) == {**before, key: dtype} and before[key] != dtype:
            return with_dtype(after, dtype)
    return config


def _write_index(base: Checkpoint, folder: Path, stored: str | None) -> None:
    if base.index is None:
        return
    total = sum(output_bytes(file, stored) for file in base.files.values())
    if total == sum(output_bytes(file, None) for file in base.files.values()):
        write_atomic(folder / INDEX, (base.path / INDEX).read_bytes())
        return
    metadata = {**(base.index.get("metadata") or {}), "total_size": total}
    content = json.dumps({**base.index, "metadata": metadata}, indent=2, ensure_ascii=False)
    write_atomic(folder / INDEX, (content + "\n").encode())


def _report(plan: MergePlan, output: Path, dtype: str | None, counts: Counts, elapsed_s: float) -> MergeReport:
    retention = {family: counts.tallies[family].retention() for family in sorted(counts.tallies)}
    notices = [*plan.warnings, *advice(retention)]
    if not counts.changed:
        notices.append("every delta is zero: the output equals the base")
    if counts.converted:
        notices.append(f"{counts.converted} tensors without a delta were converted to {dtype} as well")
    return MergeReport(
        output=output,
        base=plan.base.path,
        adapter=plan.adapter.path,
        dtype=dtype,
        tensors_changed=counts.changed,
        tensors_copied=counts.copied,
        tensors_converted=counts.converted,
        bytes_written=sum(file.stat().st_size for file in output.iterdir()),
        elapsed_s=elapsed_s,
        retention=retention,
        warnings=tuple(notices),
    )


def _progress(progress: Progress | None, base: Checkpoint) -> Callable[[str, int], None]:
    total = sum(info.num_bytes for info in base.tensors.values())
    done = 0

    def advance(shard: str, num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(shard, done, total)

    return advance


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
