"""Verify, part one: every tensor of the merged checkpoint against base and adapter, streaming.

Exact where it can be: a tensor without a delta must have the base's bits (rounded to the new dtype, if it changed),
and a tensor with one must lie within half a unit in the last place of W + scale * B A computed in float64, plus the
error that float32 arithmetic may make; the scales of FP8 blocks must be those of that sum. Whatever a merge gets wrong
by more than rounding shows up here by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from finetune.adapters.weight_delta import WeightDelta
from finetune.architecture.names import kind_of
from finetune.config.tensor_header import TensorInfo
from finetune.io.pieces import FLOAT_DTYPES, row_ranges
from finetune.io.workers import exact_workers
from finetune.merging.plan import MergePlan
from finetune.models import fp8
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import TORCH_DTYPES

_UNTOUCHED = "without a delta"
_FLOAT64_EXPONENT = 0x7FF << 52
_FLOAT32_ROUNDOFF = 2.0**-23


@dataclass
class WeightAgreement:
    """How well one family of weights agrees.

    max_error: largest |merged - exact|.  worst_share: largest error as a share of what rounding allows, wrong when
    over 1.  worst: the tensor it was found in.
    """

    tensors: int = 0
    max_error: float = 0.0
    worst_share: float = 0.0
    worst: str = ""

    def add(self, name: str, max_error: float, share: float) -> None:
        """Adds one tensor."""
        self.tensors += 1
        self.max_error = max(self.max_error, max_error)
        if share > self.worst_share or not self.worst:
            self.worst_share, self.worst = share, name


@dataclass(frozen=True)
class WeightCheck:
    """agreement: per family, and for all tensors without a delta.  wrong: tensor name -> what is wrong with it."""

    agreement: dict[str, WeightAgreement]
    wrong: dict[str, str]


def check_weights(plan: MergePlan, merged: Checkpoint) -> WeightCheck:
    """Compares all tensors; memory for one piece of one tensor. Raises nothing on disagreement: see `wrong`."""
    here, there = set(plan.base.weights), set(merged.weights)
    wrong = dict.fromkeys(here - there, "is missing") | dict.fromkeys(there - here, "is not in the base")
    for name in here & there:
        if mismatch := _header_mismatch(plan.base.tensors[name], merged.tensors[name]):
            wrong[name] = mismatch
    names = [name for name in plan.base.weights if name not in wrong]
    agreement: dict[str, WeightAgreement] = {}
    with exact_workers() as workers:
        results = workers.map(lambda name: _compare(name, plan, merged), names)
        for name, (changed, error, share) in zip(names, results, strict=True):
            kind = kind_of(name) if changed else _UNTOUCHED
            agreement.setdefault(kind, WeightAgreement()).add(name, error, share)
            if not share <= 1.0:
                wrong[name] = f"differs from the base by up to {error:.3g}, although the adapter does not change it"
                if changed:
                    wrong[name] = f"differs from base + adapter by {error:.3g}, {share:.3g} times what rounding allows"
    return WeightCheck(agreement, wrong)


def half_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of `dtype` at each value (float64): the error of one rounding to nearest."""
    power_of_two = values.view(torch.int64).bitwise_and(_FLOAT64_EXPONENT).view(torch.float64)
    return power_of_two.clamp_(min=torch.finfo(dtype).tiny).mul_(torch.finfo(dtype).eps / 2)


def _header_mismatch(base: TensorInfo, merged: TensorInfo) -> str | None:
    if base.shape != merged.shape:
        return f"has shape {list(merged.shape)}, in the base {list(base.shape)}"
    if base.dtype != merged.dtype and not {base.dtype, merged.dtype} <= set(FLOAT_DTYPES):
        return f"is stored as {merged.dtype}, in the base as {base.dtype}"
    return None


def _compare(name: str, plan: MergePlan, merged: Checkpoint) -> tuple[bool, float, float]:
    """(has a delta, largest error, largest error / allowed error) of one tensor; NaN in the merged tensor gives inf."""
    delta = plan.read(name) if name in plan.kinds else None
    compare = _error_without_delta if delta is None else partial(_error_with_delta, delta)
    block = (merged.fp8_block or plan.base.fp8_block or (1, 1))[0]
    worst_error = worst_share = 0.0
    for start, stop in row_ranges(plan.base.tensors[name], block):
        error, share = compare(_Rows(plan.base, merged, name, start, stop))
        worst_error, worst_share = max(worst_error, error), max(worst_share, share)
    return delta is not None, worst_error, worst_share


@dataclass(frozen=True)
class _Rows:
    """The same rows of a tensor in base and merged checkpoint; a scalar has none."""

    base: Checkpoint
    merged: Checkpoint
    name: str
    start: int
    stop: int

    @property
    def rows(self) -> slice | None:
        return slice(self.start, self.stop) if self.base.tensors[self.name].shape else None

    @property
    def scales(self) -> Tensor | None:
        """Scale of every value of an FP8 weight of the merged checkpoint, float64."""
        block, scales = self.merged.fp8_block, self.merged.scales_of(self.name)
        if scales is None or block is None:
            return None
        width = self.merged.tensors[self.name].shape[1]
        ones = torch.ones(self.stop - self.start, width).to(torch.float8_e4m3fn)
        return fp8.dequantize(ones, self.merged.read(scales), block, self.start).double()


def _error_without_delta(rows: _Rows) -> tuple[float, float]:
    m = rows.merged.read(rows.name, rows.rows)
    expected = rows.base.read(rows.name, rows.rows)
    if expected.dtype != m.dtype:
        expected = rows.base.read_float(rows.name, rows.rows).to(m.dtype)
    same_scales = rows.scales is None or torch.equal(_scales(rows.base, rows.name), _scales(rows.merged, rows.name))
    if torch.equal(_bits(expected), _bits(m)) and same_scales:
        return 0.0, 0.0
    return _largest((rows.merged.read_float(rows.name, rows.rows).double() - expected.double()).abs()), math.inf


def _scales(checkpoint: Checkpoint, name: str) -> Tensor:
    scales = checkpoint.scales_of(name)
    return checkpoint.read(scales) if scales else torch.empty(0)


def _error_with_delta(delta: WeightDelta, rows: _Rows) -> tuple[float, float]:
    w, m = rows.base.read_float(rows.name, rows.rows), rows.merged.read_float(rows.name, rows.rows)
    these = slice(rows.start, rows.stop)
    exact = delta.exact_rows(these).add_(w)
    error = exact.sub(m).abs_()
    # what float32 arithmetic may add to one rounding: every product and sum off by one unit of its size
    size = delta.roundings(these).add_(w.abs())
    dtype, scales = TORCH_DTYPES[rows.merged.tensors[rows.name].dtype], rows.scales
    if scales is None:
        allowed = half_unit(exact, dtype)
    else:
        allowed = half_unit(exact / scales, dtype).mul_(scales)
        if not _right_scales(rows, exact, scales):
            return _largest(error), math.inf
    return _largest(error), _largest(error / allowed.add_(size, alpha=_FLOAT32_ROUNDOFF))


def _right_scales(rows: _Rows, exact: Tensor, scales: Tensor) -> bool:
    """Whether the largest value of every block is 448 of its units, up to the rounding of the scale."""
    block = rows.merged.fp8_block
    assert block is not None
    name = rows.merged.scales_of(rows.name)
    assert name is not None
    wanted = fp8.quantize(exact.float(), block, torch.float32)[1]
    found = scales[:: block[0], :: block[1]]
    unit = torch.finfo(TORCH_DTYPES[rows.merged.tensors[name].dtype]).eps
    return bool(((found / wanted - 1).abs() <= max(unit, 1e-4)).all())


def _largest(values: Tensor) -> float:
    return torch.nan_to_num(values, nan=torch.inf).max().item() if values.numel() else 0.0


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)
