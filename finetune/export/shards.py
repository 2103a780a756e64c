"""Merge, part two: write one shard of the output, tensor by tensor, piece by piece.

W' = round(float32(W) + (scale * float32(B)) @ float32(A)), rounded once, to the storage dtype.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.files import LowRank
from finetune.errors import ModelError, Problem
from finetune.export.plan import MergePlan
from finetune.export.retention import Tally
from finetune.models.tensor_file import BITS, METADATA, TORCH_DTYPES, WEIGHT_DTYPES, TensorFile, TensorInfo

PIECE_ELEMENTS = 2**18
COPY_BYTES = 2**22


@dataclass
class Counts:
    """What was done to the tensors so far, and the tally of each family."""

    changed: int = 0
    copied: int = 0
    converted: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards of a plan, several tensors at a time, each at its own place in the file.

    dtype: safetensors name every weight is stored in, None to keep each tensor's own.
    workers: runs the tensors; each thread should use one core.
    advance: called with (shard, bytes read) after each tensor, from the calling thread.
    """

    plan: MergePlan
    dtype: str | None
    workers: Executor
    counts: Counts
    advance: Callable[[str, int], None]

    def write(self, shard: str, path: Path) -> None:
        """Writes `path` from the base's `shard` and makes it durable. Header and order are the base's own."""
        source = self.plan.base.files[shard]
        layout = output_layout(source, self.dtype)
        with path.open("wb", buffering=0) as file:
            header = _header(source, layout)
            _write_at(file.fileno(), 0, memoryview(header))
            tasks = [
                self.workers.submit(self._write_tensor, name, source, info, _Place(file.fileno(), len(header), info))
                for name, info in layout.items()
            ]
            try:
                for name, task in zip(layout, tasks, strict=True):
                    self._count(name, source.tensors[name], layout[name], task.result())
                    self.advance(shard, source.tensors[name].num_bytes)
            except BaseException:
                for task in tasks:
                    task.cancel()
                wait(tasks)
                raise
            os.fsync(file.fileno())

    def _count(self, name: str, before: TensorInfo, after: TensorInfo, tally: Tally | None) -> None:
        if tally is not None:
            self.counts.changed += 1
            self.counts.tallies.setdefault(self.plan.families[name], Tally()).merge(tally)
        elif before.dtype != after.dtype:
            self.counts.converted += 1
        else:
            self.counts.copied += 1

    def _write_tensor(self, name: str, source: TensorFile, info: TensorInfo, place: _Place) -> Tally | None:
        factors = self.plan.adapter.read(name) if name in self.plan.families else None
        if factors is not None and not factors.is_zero:
            return _write_merged(name, source, factors, TORCH_DTYPES[info.dtype], place)
        # W + 0 is W to the bit, also where it is -0.0
        if info.dtype == source.tensors[name].dtype:
            _copy(source, source.tensors[name], place)
        else:
            for _, w in _pieces(name, source):
                place.append(_finite(name, source, w.to(TORCH_DTYPES[info.dtype])))
        return None


class _Place:
    """Where a tensor's next bytes go in the output file; positioned writes, so that threads share the file."""

    def __init__(self, descriptor: int, data_start: int, info: TensorInfo) -> None:
        self._descriptor, self._position = descriptor, data_start + info.offsets[0]

    def append(self, data: Tensor | memoryview) -> None:
        if isinstance(data, Tensor):
            if not data.numel():
                return
            data = data.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_at(self._descriptor, self._position, data)
        self._position += len(data)


def _write_merged(name: str, source: TensorFile, factors: LowRank, dtype: torch.dtype, place: _Place) -> Tally:
    tally = Tally()
    tally.tensors = 1
    b_OR = factors.b * factors.scale
    for start, w in _pieces(name, source):
        base = w.float()
        wanted = torch.mm(b_OR[start : start + len(w)], factors.a)
        stored = _finite(name, source, torch.add(base, wanted).to(dtype))
        place.append(stored)
        tally.add(stored.float().sub_(base) if dtype != torch.float32 else stored.sub_(base), wanted)
    return tally


def _copy(source: TensorFile, info: TensorInfo, place: _Place) -> None:
    buffer = memoryview(bytearray(min(COPY_BYTES, info.num_bytes)))
    for start in range(*info.offsets, COPY_BYTES):
        piece = buffer[: min(COPY_BYTES, info.offsets[1] - start)]
        source.read_into(piece, start)
        place.append(piece)


def output_layout(source: TensorFile, dtype: str | None) -> dict[str, TensorInfo]:
    """The output's tensors in data order. Without `dtype`, or where nothing changes, it is the source's layout."""
    ordered = sorted(source.tensors.items(), key=lambda item: item[1].offsets)
    kept = {name: _stored_dtype(info, dtype) for name, info in ordered}
    if all(kept[name] == info.dtype for name, info in ordered):
        return dict(ordered)
    ordered.sort(key=lambda item: -BITS[kept[item[0]]])  # wide types first keeps every tensor aligned
    layout, position = {}, 0
    for name, info in ordered:
        end = position + info.numel * BITS[kept[name]] // 8
        layout[name] = TensorInfo(info.shard, kept[name], info.shape, (position, end))
        position = end
    return layout


def output_bytes(source: TensorFile, dtype: str | None) -> int:
    """Data bytes of the output's shard, without its header."""
    return sum(info.num_bytes for info in output_layout(source, dtype).values())


def _stored_dtype(info: TensorInfo, dtype: str | None) -> str:
    return dtype if dtype is not None and info.dtype in (*WEIGHT_DTYPES, "F64") else info.dtype


def _header(source: TensorFile, layout: dict[str, TensorInfo]) -> bytes:
    if all(layout[name] == info for name, info in source.tensors.items()):
        with source.path.open("rb") as file:
            return file.read(source.data_start)
    content: dict[str, object] = {METADATA: source.metadata} if source.metadata else {}
    for name, info in layout.items():
        content[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(name: str, source: TensorFile) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor, in pieces that stay in the processor's cache; vectors count as columns."""
    shape = source.tensors[name].shape
    if not shape:
        yield 0, source.read(name)
        return
    step = max(1, PIECE_ELEMENTS * shape[0] // max(source.tensors[name].numel, 1))
    for start in range(0, shape[0], step):
        yield start, source.read(name, slice(start, start + step))


def _finite(name: str, source: TensorFile, stored: Tensor) -> Tensor:
    if stored.numel() and not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(stored)):
        hint = "the base has such values itself, or they do not fit the dtype: use --dtype bf16 or fp32"
        what = f"is not finite as {str(stored.dtype).removeprefix('torch.')}"
        raise ModelError(Problem(f"{source.path}: {name}", what, hint))
    return stored


def _write_at(descriptor: int, position: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
