"""Merge, part two: what fills every tensor of the output, piece by piece.

W' = round(float32(W) + (scale * float32(B)) @ float32(A)), or + float32(delta) for a whole expert, rounded once, to the
storage dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finetune.adapters.weight_delta import WeightDelta
from finetune.config.tensor_header import BITS
from finetune.errors import ModelError, Problem
from finetune.io import safetensors_file
from finetune.io.pieces import FLOAT_DTYPES, all_finite, copy, row_ranges
from finetune.io.stream import OutputFile, Place
from finetune.merging.plan import MergePlan
from finetune.merging.retention import Tally
from finetune.models import fp8
from finetune.models.tensor_file import TORCH_DTYPES, Stored, TensorFile

MEASURED = 2**16  # elements of a tensor that retention is measured on; all of them would take a third of the time
PARTS = "parts"
_THREAD = threading.local()


def plan_files(plan: MergePlan, dtype: str | None) -> list[OutputFile]:
    """The output's shards: the base's, tensor by tensor.

    dtype: safetensors name every weight is stored in, None to keep each tensor's own. FP8 weights that get another
    dtype lose their scales. What each tensor reports is its Tally as JSON, None where nothing was added to it.
    """
    return [
        _plan_file(plan, shard, dtype)
        for shard in plan.base.shards
        if any(_stored(plan, name, dtype) for name in plan.base.files[shard].tensors)
    ]


def stored_dtypes(plan: MergePlan, dtype: str | None) -> dict[str, str]:
    """Name -> safetensors dtype of every tensor of the output."""
    stored = {name: _stored(plan, name, dtype) for name in plan.base.tensors}
    return {name: kept for name, kept in stored.items() if kept is not None}


def _stored(plan: MergePlan, name: str, dtype: str | None) -> str | None:
    info = plan.base.tensors[name]
    if dtype is None or info.dtype not in FLOAT_DTYPES:
        return info.dtype
    return None if name in plan.scales else dtype


def _plan_file(plan: MergePlan, shard: str, dtype: str | None) -> OutputFile:
    source = plan.base.files[shard]
    ordered = sorted(source.stored.items(), key=lambda item: item[1].info.offsets)
    tensors = []
    for name, stored in ordered:
        kept = _stored(plan, stored.parts[0], dtype)
        if kept is not None:
            same_name = stored.parts == (name,)
            fill = partial(_fill, plan, name, kept) if same_name else partial(_fill_parts, plan, stored, name, kept)
            info = stored.info
            tensors.append(safetensors_file.Tensor(name, kept, info.shape, fill, info.num_bytes))
    same = [(tensor.name, tensor.dtype) for tensor in tensors] == [(name, each.info.dtype) for name, each in ordered]
    return safetensors_file.plan_file(shard, tensors, source.metadata, _header_of(source) if same else None)


def _header_of(source: TensorFile) -> bytes:
    with source.path.open("rb") as file:
        return file.read(source.data_start)


def _fill(plan: MergePlan, name: str, kept: str, place: Place) -> dict[str, Any] | None:
    """Writes one tensor; its tally where the adapters change it."""
    weight = plan.scales.get(name, name)
    delta = plan.read(weight) if weight in plan.kinds else None
    info = plan.base.tensors[name]
    if delta is None:  # W + 0 is W to the bit, also where it is -0.0
        if kept == info.dtype and not plan.remakes(name):
            copy(plan.base.files[info.shard], name, place)
        else:
            for start, stop in row_ranges(info):
                piece = plan.base.read_float(name, slice(start, stop)) if info.shape else plan.base.read(name)
                place.append(_finite(plan, name, piece.to(TORCH_DTYPES[kept])))
        return None
    if name in plan.scales:
        for _, scales, _ in _merged_blocks(plan, weight, delta):
            place.append(scales)
        return None
    return (_fill_blocks if kept == fp8.DTYPE else partial(_fill_merged, kept))(plan, name, delta, place).to_dict()


def _fill_parts(plan: MergePlan, stored: Stored, name: str, kept: str, place: Place) -> dict[str, Any]:
    """Writes a tensor whose matrices have other names in the plan; what each of them reports, under PARTS."""
    if plan.base.tensors[stored.parts[0]].columns is None:
        return {PARTS: {part: _fill(plan, part, kept, place) for part in stored.parts}}
    reports: dict[str, Any] = {}
    matrices = len(stored.parts) // stored.info.shape[0]
    for first in range(0, len(stored.parts), matrices):
        merged = [_merged(plan, part, kept, reports) for part in stored.parts[first : first + matrices]]
        place.append(torch.cat(merged).T)
    return {PARTS: reports}


def _merged(plan: MergePlan, name: str, kept: str, reports: dict[str, Any]) -> Tensor:
    """One matrix of a transposed stack as it is stored; its tally goes to `reports`."""
    delta = plan.read(name) if name in plan.kinds else None
    reports[name] = None
    if delta is None and kept == plan.base.tensors[name].dtype and not plan.remakes(name):
        return _finite(plan, name, plan.base.read(name))
    base = plan.base.read_float(name)
    if delta is None:
        return _finite(plan, name, base.to(TORCH_DTYPES[kept]))
    everything = slice(None)
    stored = _finite(plan, name, delta.add_to_(base.clone(), everything).to(TORCH_DTYPES[kept]))
    tally = Tally(tensors=1)
    tally.add(stored.float() - base, delta.rows(everything))
    reports[name] = tally.to_dict()
    return stored


def reports_by_weight(reported: dict[str, Any]) -> dict[str, Any]:
    """What each weight reported, where some tensors hold several."""
    found: dict[str, Any] = {}
    for name, report in reported.items():
        found |= report[PARTS] if report is not None and PARTS in report else {name: report}
    return found


def _fill_merged(kept: str, plan: MergePlan, name: str, delta: WeightDelta, place: Place) -> Tally:
    tally = Tally(tensors=1)
    for rows, base in _base_rows(plan, name, 1):
        first = slice(min(len(base), max(1, MEASURED // base.shape[1])) if rows.start == 0 else 0)
        before = base[first].clone()
        merged = delta.add_to_(base, rows)
        stored = merged if kept == "F32" else _scratch("read", base.shape, TORCH_DTYPES[kept]).copy_(merged)
        place.append(_finite(plan, name, stored))
        if rows.start == 0:
            tally.add(stored[first].float().sub_(before), delta.rows(first))
    return tally


def _fill_blocks(plan: MergePlan, name: str, delta: WeightDelta, place: Place) -> Tally:
    block = plan.base.fp8_block
    assert block is not None
    tally = Tally(tensors=1)
    for values, scales, (base, wanted) in _merged_blocks(plan, name, delta):
        place.append(values)
        tally.add(fp8.dequantize(values, scales, block).sub_(base), wanted)
    return tally


def _merged_blocks(
    plan: MergePlan, name: str, delta: WeightDelta
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """(values, scales, (base, delta)) of a merged FP8 weight, some rows of blocks at a time."""
    scales, block = plan.base.scales_of(name), plan.base.fp8_block
    assert scales is not None
    assert block is not None
    scale_dtype = TORCH_DTYPES[plan.base.tensors[scales].dtype]
    for rows, base in _base_rows(plan, name, block[0]):
        wanted = delta.rows(rows)
        merged = _finite(plan, name, torch.add(base, wanted))
        yield *fp8.quantize(merged, block, scale_dtype), (base, wanted)


def _base_rows(plan: MergePlan, name: str, multiple: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, base) in float32, in pieces of a multiple of `multiple` rows; to be overwritten, valid until the next."""
    info = plan.base.tensors[name]
    for start, stop in row_ranges(info, multiple):
        rows, shape = slice(start, stop), torch.Size((stop - start, *info.shape[1:]))
        if plan.base.scales_of(name):
            yield rows, plan.base.read_float(name, rows)
        else:
            raw = _scratch("read", torch.Size([shape.numel() * BITS[info.dtype] // 8]), torch.uint8)
            yield rows, _scratch("base", shape).copy_(plan.base.read(name, rows, scratch=raw))


def _scratch(use: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of this thread that is used over and over: fresh pages would cost more than the arithmetic.

    What was read is written over by what is stored, so that less has to stay in the processor's cache.
    """
    held: dict[Any, Tensor] = vars(_THREAD)
    key = f"{use} {dtype} {shape}"
    if key not in held:
        num_bytes = shape.numel() * dtype.itemsize
        if use not in held or held[use].numel() < num_bytes:
            for other in [name for name in held if name.startswith(f"{use} ")]:
                del held[other]
            held[use] = torch.empty(num_bytes, dtype=torch.uint8)
        held[key] = held[use][:num_bytes].view(dtype).view(shape)
    return held[key]


def _finite(plan: MergePlan, name: str, stored: Tensor) -> Tensor:
    if not all_finite(stored):
        hint = "the base has such values itself, or they do not fit the dtype: use --dtype bf16 or fp32"
        what = f"is not finite as {str(stored.dtype).removeprefix('torch.')}"
        raise ModelError(Problem(f"{plan.base.files[plan.base.tensors[name].shard].path}: {name}", what, hint))
    return stored


def num_bytes(plan: MergePlan, stored: dict[str, str]) -> int:
    """Data bytes of an output, without headers."""
    return sum(plan.base.tensors[name].numel * BITS[dtype] // 8 for name, dtype in stored.items())
