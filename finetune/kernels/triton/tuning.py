"""Measures the candidates for the tiles of the grouped products on the card that is here.

For when a model is prepared, never inside a forward. What was measured is remembered on disk for the card, the version
of Triton, the type, the widths, the rank and the power of two of the number of rows.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from finetune.kernels.device_path import Inputs
from finetune.kernels.triton import remembered, routing, shapes
from finetune.kernels.triton.down_back import down_back
from finetune.kernels.triton.gate_up import gate_up
from finetune.kernels.triton.project import LowRank, project
from finetune.kernels.triton.shapes import Shape, Shapes, Workload, bucket
from finetune.kernels.triton.tiles import Tiling

logger = logging.getLogger(__name__)
Run = Callable[[], tuple[Tensor, ...]]
Timer = Callable[[Run], float]

TOLERANCE = 1e-2
"""Largest relative difference, by norm, from what the standard tiles give: some orders of the sum in 16 bits."""

GAIN = 0.98
"""Tiles are taken for better from this share of the standard tiles' time on; the rest is noise."""


class Measured(NamedTuple):
    """One candidate. seconds: None where it does not run or is wrong, for the reason in `fault`."""

    product: str
    shape: Shape
    seconds: float | None
    fault: str = ""


def prepare(
    workload: Workload, tokens: int, top_k: int, *, timer: Timer | None = None, path: Path | None = None
) -> Shapes:
    """Measures or remembers the tiles for a workload, once per process; later calls with as many rows take them.

    tokens: of one forward, all sequences of a micro-batch. timer: of tests; without one nothing is timed but on CUDA.
    path: of the file, by default that of the user. About a second for each tile that Triton has not compiled before.
    Needs the memory of one layer in 16 bits beside that of its rows; without it the standard tiles stay.
    """
    workload = workload._replace(device=_with_index(workload.device))
    num_rows, path = tokens * top_k, path or remembered.default_path()
    key = (workload, bucket(num_rows))
    if key not in shapes.TUNED:
        found = _remembered(path, workload, num_rows)
        if found is None and (timer is not None or workload.device.type == "cuda"):
            found = _measured(workload, tokens, top_k, timer or _cuda_seconds)
            if found is not None:
                remembered.write(path, entry_name(workload, num_rows), found)
        shapes.TUNED[key] = found or shapes.standard(workload, num_rows)
    return shapes.TUNED[key]


def drop(workload: Workload, tokens: int, top_k: int, *, path: Path | None = None) -> None:
    """The standard tiles for this workload, from here on and in later processes, whatever was measured."""
    workload, num_rows = workload._replace(device=_with_index(workload.device)), tokens * top_k
    usual = shapes.TUNED[workload, bucket(num_rows)] = shapes.standard(workload, num_rows)
    remembered.write(path or remembered.default_path(), entry_name(workload, num_rows), usual)


def entry_name(workload: Workload, num_rows: int) -> str:
    """What a measurement holds for."""
    device, dtype, *sizes = workload
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    experts, hidden, intermediate, rank = sizes
    widths = f"E{experts} H{hidden} I{intermediate} R{rank}"
    return f"{card}, triton {triton.__version__}, {str(dtype).removeprefix('torch.')}, {widths}, P<2^{bucket(num_rows)}"


def choices(workload: Workload, num_rows: int) -> list[dict[str, list[Shape]]]:
    """The candidates; a process without a GPU, in a test, measures those of compute capability 9."""
    major = shapes.capability(workload.device)[0] if workload.device.type == "cuda" else 9
    return shapes.candidates(num_rows, workload, major)


def measure(workload: Workload, tokens: int, top_k: int, timer: Timer | None = None) -> list[Measured]:
    """Every candidate of every product, compared with the standard tiles before it is timed."""
    trial, found = _Trial(workload, tokens, top_k), []
    for product in Shapes._fields:
        want = trial.run(product, shapes.standard(workload, tokens * top_k)[Shapes._fields.index(product)])()
        for choice in choices(workload, tokens * top_k):
            for shape in choice[product]:
                found.append(_one(product, shape, trial.run(product, shape), want, timer or _cuda_seconds))
    return found


def best(measured: list[Measured], options: list[dict[str, list[Shape]]], usual: Shapes) -> Shapes:
    """The fastest set that shares its number of rows; the standard one where nothing is clearly faster."""
    seconds = {(m.product, m.shape): m.seconds for m in measured if m.seconds is not None}
    timed = [seconds.get((product, shape)) for product, shape in usual._asdict().items()]
    chosen, least = usual, float("inf") if None in timed else GAIN * sum(filter(None, timed))
    for option in options:
        runs = [[(seconds[p, s], i, s) for i, s in enumerate(option[p]) if (p, s) in seconds] for p in Shapes._fields]
        if not all(runs):
            continue
        winners = [min(candidates)[::2] for candidates in runs]
        if (total := sum(elapsed for elapsed, _ in winners)) < least:
            chosen, least = Shapes(*(shape for _, shape in winners)), total
    return chosen


def _measured(workload: Workload, tokens: int, top_k: int, timer: Timer) -> Shapes | None:
    options = choices(workload, tokens * top_k)
    if not options:
        return None
    logger.info("choosing tiles for this card, once")
    start = time.perf_counter()
    try:
        measured = measure(workload, tokens, top_k, timer)
    except torch.OutOfMemoryError:
        logger.warning("no memory to measure tiles: the standard ones stay")
        return None
    found = best(measured, options, shapes.standard(workload, tokens * top_k))
    logger.info("tiles chosen in %.0f s: %s", time.perf_counter() - start, found)
    return found


def _remembered(path: Path, workload: Workload, num_rows: int) -> Shapes | None:
    found, options = remembered.read(path).get(entry_name(workload, num_rows)), choices(workload, num_rows)
    known = {product: {s for option in options for s in option[product]} for product in Shapes._fields if options}
    if found is None or found == shapes.standard(workload, num_rows):
        return found
    rows_agree = len({shape.rows for shape in found}) == 1
    return found if rows_agree and all(s in known.get(p, ()) for p, s in found._asdict().items()) else None


def _one(product: str, shape: Shape, run: Run, want: tuple[Tensor, ...], timer: Timer) -> Measured:
    try:
        errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(run(), want, strict=True)]
        if not all(error <= TOLERANCE for error in errors):
            fault = f"wrong by {', '.join(f'{error:.2g}' for error in errors)}"
            logger.warning("%s with tiles of %s is %s: not taken", product, shape, fault)
            return Measured(product, shape, None, fault)
        return Measured(product, shape, timer(run))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton has errors of its own for tiles that are too large for a card
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        logger.debug("%s with tiles of %s does not run: %s", product, shape, reason)
        return Measured(product, shape, None, reason)


def _cuda_seconds(run: Run) -> float:
    """The median of seven runs, each over the whole of the layer's weights, after two to warm up."""
    for _ in range(2):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(7)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def _with_index(device: torch.device) -> torch.device:
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return device if device.index == index else torch.device(device.type, index)


class _Trial:
    """A random layer and random rows, on average as many for each expert, and every product on them."""

    def __init__(self, workload: Workload, tokens: int, top_k: int) -> None:
        self.workload, num_rows = workload, tokens * top_k
        device, dtype, experts, hidden, intermediate, rank = workload
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(std=std, generator=generator)

        scores_TE = torch.rand(tokens, experts, device=device, generator=generator)
        self.rows = routing.sort_rows(scores_TE.topk(top_k).indices, experts)
        self.tokens = Inputs(normal(tokens, hidden), self.rows.token_P)
        self.gate_up_PG, self.h_PI = normal(num_rows, 2 * intermediate), normal(num_rows, intermediate)
        self.weights_TK = torch.rand(tokens, top_k, device=device, generator=generator).to(dtype)
        self.gate_up_EGH = normal(experts, 2 * intermediate, hidden, std=hidden**-0.5)
        self.down_EHI = normal(experts, hidden, intermediate, std=intermediate**-0.5)
        self.z_PR, slots = normal(num_rows, rank), torch.arange(experts, device=device)
        heights = {"gate_up": 2 * intermediate, "down": hidden, "down_back": intermediate, "gate_up_back": hidden}
        self.low_rank: dict[str, LowRank | None] = dict.fromkeys(heights)
        for name, height in heights.items() if rank else ():
            mirrored = name.endswith("back")
            factor = normal(experts, *((rank, height) if mirrored else (height, rank)), std=0.1, dtype=torch.float32)
            self.low_rank[name] = LowRank(self.z_PR, factor.mT if mirrored else factor, slots, 1.0)

    def run(self, product: str, shape: Shape) -> Run:
        """One product with these tiles; tiles of rows are cut here, once."""
        tiles = routing.tile_rows(self.rows.end_E, len(self.rows.pair_P), shape.rows)
        tiling, low_rank = Tiling(Shapes.same(shape), self.rows, *tiles), self.low_rank[product]
        if product == "gate_up":
            return lambda: gate_up(self.tokens, self.gate_up_EGH, low_rank, tiling, keep=True)
        if product == "down":
            return lambda: (project(Inputs(self.h_PI), self.down_EHI, low_rank, tiling),)
        if product == "down_back":
            saved = self.gate_up_PG, self.weights_TK
            return lambda: tuple(down_back(self.tokens, self.down_EHI.mT, low_rank, saved, tiling))
        return lambda: (project(Inputs(self.gate_up_PG), self.gate_up_EGH.mT, low_rank, tiling),)
