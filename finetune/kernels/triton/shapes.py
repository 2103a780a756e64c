"""Which tiles the grouped products take: a table for cards and loads, and what was measured on this card.

`tuning.prepare` measures; here is what a forward asks, one look into a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch

from finetune.kernels.layer import ExpertLayer


@dataclass(frozen=True)
class Shape:
    """Tile sizes and launch options of a grouped product.

    rows, columns, depth: M, N and the depth of one step of the inner loop, in values of 16 bits.
    programs: of each multiprocessor, which walk from tile to tile and read boxes through TMA descriptors (compute
        capability 9); 0 for one program for each tile, which reads through pointers.
    flat: walk and inner loop are one pipelined loop.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    programs: int = 0
    flat: bool = False

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What every grouped product is compiled with."""
        return {
            "M": self.rows, "N": self.columns, "D": self.depth, "WALK": self.programs > 0, "FLAT": self.flat,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip

    @cached_property
    def pointed(self) -> Shape:
        """The same tile for operands that TMA cannot read: with pointers, for which all tiles of a table exist."""
        return replace(self, programs=0, flat=False, num_stages=min(self.num_stages, 3))

    def __str__(self) -> str:
        walk = f", walking{' flat' if self.flat else ''} x{self.programs}" if self.programs else ""
        return f"{self.rows}x{self.columns}x{self.depth}, {self.num_warps} warps, {self.num_stages} stages{walk}"


class Shapes(NamedTuple):
    """Tiles of the products of one pass; all with as many rows, which are cut once."""

    gate_up: Shape
    down: Shape
    down_back: Shape
    gate_up_back: Shape

    @classmethod
    def same(cls, shape: Shape) -> Shapes:
        """One shape for all."""
        return cls(shape, shape, shape, shape)

    @property
    def tile_rows(self) -> int:
        """M."""
        return self.gate_up.rows


class Workload(NamedTuple):
    """What decides the best tiles, beside the number of rows. rank: the larger one, 0 without factors."""

    device: torch.device
    dtype: torch.dtype
    experts: int
    hidden: int
    intermediate: int
    rank: int

    @classmethod
    def of(cls, layer: ExpertLayer, dtype: torch.dtype) -> Workload:
        """That of a layer. dtype: of the products."""
        experts, hidden, intermediate = layer.down_EHI.shape
        ranks = [lora.a_XRI.shape[1] for lora in (layer.gate_up_lora, layer.down_lora) if lora is not None]
        return cls(layer.down_EHI.device, dtype, experts, hidden, intermediate, max(ranks, default=0))


BUSY = Shape(128, 128, 64, num_warps=8, num_stages=3)
WIDE = Shape(128, 256, 64, num_warps=8, num_stages=3)
SPARSE = Shape(64, 128, 64, num_warps=4, num_stages=3)
DECODE = Shape(16, 64, 128, num_warps=4, num_stages=3)

NARROW = replace(SPARSE, columns=256)
WIDE_FLAT = replace(WIDE, programs=1, flat=True)
DEEP_FLAT = replace(WIDE_FLAT, num_stages=4)
BUSY_FLAT = replace(BUSY, num_stages=4, programs=1, flat=True)
SPARSE_FLAT = replace(SPARSE, num_stages=4, programs=2, flat=True)
WIDE_WALK, BUSY_WALK = replace(DEEP_FLAT, flat=False), replace(BUSY_FLAT, flat=False)
"""For `down_back_rows`, whose epilogue has a loop of its own: the walk and the inner loop stay two."""

WIDE_LOAD = 512
"""Rows of an expert from which 128 x 256 was faster on an H200: by 5 % of a step of the layer at 8,192 tokens."""


def shape_for(num_rows: int, num_experts: int) -> Shape:
    """Tiles for an average load that any card takes; the host knows no other."""
    load = num_rows / num_experts
    return DECODE if load <= 8 else SPARSE if load <= 64 else BUSY


def depth_for(depth: int, dtype: torch.dtype) -> int:
    """As many values as take the shared memory of `depth` values of 16 bits, the most that small GPUs have."""
    return depth * 2 // dtype.itemsize


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; elsewhere few, so that programs do walk."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def standard(workload: Workload, num_rows: int) -> Shapes:
    """Tiles without a measurement."""
    shape, dtype = shape_for(num_rows, workload.experts), workload.dtype
    if num_rows >= WIDE_LOAD * workload.experts and dtype.itemsize == 2 and capability(workload.device)[0] == 9:
        shape = WIDE
    return fitted(shape, dtype, workload.rank)


@cache
def fitted(shape: Shape, dtype: torch.dtype, rank: int) -> Shapes:
    """One shape for all products, as deep as a type allows, and narrower where its low-rank step would spill."""
    columns = 32 if dtype.itemsize == 4 and rank > 32 and shape.rows > 16 else shape.columns
    return Shapes.same(replace(shape, columns=columns, depth=depth_for(shape.depth, dtype)))


def candidates(num_rows: int, workload: Workload, major: int) -> list[dict[str, list[Shape]]]:
    """What to measure, by product: one choice for each number of rows of a tile; empty where nothing is to choose.

    Between 32 and 256 rows an expert both 64 and 128 can be better: fewer rows computed in vain, or weights read less
    often. Every shape is compiled ahead of time in the tests, where one that spills fails; some do from rank 17 on,
    where the low-rank step is twice as deep and more.
    major: of the compute capability.
    """
    load, narrow_rank = num_rows / workload.experts, workload.rank <= 16
    if load < 32 or workload.dtype.itemsize != 2 or major < 8:
        return []
    many: dict[str, list[Shape]] = {name: [BUSY] for name in Shapes._fields}
    few: dict[str, list[Shape]] = {name: [SPARSE] for name in Shapes._fields}
    plain = ("down", "gate_up_back")  # products with nothing else to do leave memory for more
    for name in Shapes._fields if major == 9 else plain if narrow_rank else ():
        many[name].append(WIDE)
    if major == 9:
        for name in plain:
            many[name] += [WIDE_FLAT, BUSY_FLAT, *([DEEP_FLAT] if narrow_rank else [])]
            few[name] += [SPARSE_FLAT, *([NARROW] if narrow_rank else [])]
        many["gate_up"] += [WIDE_FLAT, BUSY_FLAT]
        many["down_back"] += [BUSY_WALK, *([WIDE_WALK] if narrow_rank else [])]
        few["gate_up"].append(SPARSE_FLAT)
    return [many, few] if load < 256 else [many]


TUNED: dict[tuple[Workload, int], Shapes] = {}
"""What was measured or remembered, by workload and `bucket` of rows."""

_forced: Shapes | None = None


def bucket(num_rows: int) -> int:
    """Numbers of rows within a power of two share their tiles."""
    return num_rows.bit_length()


def shapes_for(num_rows: int, workload: Workload) -> Shapes:
    """The tiles of a call."""
    if _forced is not None:
        return _forced
    tuned = TUNED.get((workload, bucket(num_rows)))
    return tuned or standard(workload, num_rows)


@contextmanager
def forced(shapes: Shapes) -> Iterator[None]:
    """These tiles for all products of this process, to check or to time them."""
    global _forced
    before, _forced = _forced, shapes
    try:
        yield
    finally:
        _forced = before
