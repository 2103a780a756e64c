"""Verify, part one: every tensor of the merged checkpoint against base and adapter, streaming.

Exact where it can be: a tensor without a delta must have the base's bits (rounded to the new dtype, if it changed),
and a tensor with one must lie within half a unit in the last place of W + scale * B A computed in float64, plus the
error that float32 arithmetic may make. Whatever a merge gets wrong by more than rounding shows up here by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from finetune.adapters.files import LowRank
from finetune.export.plan import MergePlan, family_of
from finetune.export.workers import exact_workers
from finetune.models.checkpoint import Checkpoint
from finetune.models.tensor_file import WEIGHT_DTYPES, TensorInfo

PIECE_ELEMENTS = 2**18
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
    wrong = dict.fromkeys(plan.base.tensors.keys() - merged.tensors.keys(), "is missing")
    wrong |= dict.fromkeys(merged.tensors.keys() - plan.base.tensors.keys(), "is not in the base")
    for name in plan.base.tensors.keys() - wrong.keys():
        if mismatch := _header_mismatch(plan.base.tensors[name], merged.tensors[name]):
            wrong[name] = mismatch
    names = [name for name in plan.base.tensors if name not in wrong]
    agreement: dict[str, WeightAgreement] = {}
    with exact_workers() as workers:
        results = workers.map(lambda name: _compare(name, plan, merged), names)
        for name, (changed, error, share) in zip(names, results, strict=True):
            family = family_of(name) if changed else _UNTOUCHED
            agreement.setdefault(family, WeightAgreement()).add(name, error, share)
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
    floats = (*WEIGHT_DTYPES, "F64")
    if base.dtype != merged.dtype and not (base.dtype in floats and merged.dtype in floats):
        return f"is stored as {merged.dtype}, in the base as {base.dtype}"
    return None


def _compare(name: str, plan: MergePlan, merged: Checkpoint) -> tuple[bool, float, float]:
    """(has a delta, largest error, largest error / allowed error) of one tensor; NaN in the merged tensor gives inf."""
    factors = plan.adapter.read(name) if name in plan.families else None
    if factors is not None and factors.is_zero:
        factors = None
    compare = _error_without_delta if factors is None else partial(_error_with_delta, factors)
    worst_error = worst_share = 0.0
    for start, rows in _row_ranges(plan.base.tensors[name].shape):
        error, share = compare(start, plan.base.read(name, rows), merged.read(name, rows))
        worst_error, worst_share = max(worst_error, error), max(worst_share, share)
    return factors is not None, worst_error, worst_share


def _error_without_delta(_: int, w: Tensor, m: Tensor) -> tuple[float, float]:
    expected = w.to(m.dtype)
    if torch.equal(_bits(expected), _bits(m)):
        return 0.0, 0.0
    return _largest((m.double() - expected.double()).abs()), math.inf


def _error_with_delta(factors: LowRank, start: int, w: Tensor, m: Tensor) -> tuple[float, float]:
    b_OR, a_RI = factors.b[start : start + len(w)], factors.a
    exact = torch.mm(b_OR.double(), a_RI.double()).mul_(factors.scale).add_(w)
    error = exact.sub(m).abs_()
    # what float32 arithmetic may add to one rounding: every product and sum off by one unit of its size
    size = torch.mm(b_OR.abs(), a_RI.abs()).mul_((len(a_RI) + 2) * abs(factors.scale)).add_(w.float().abs())
    allowed = half_unit(exact, m.dtype).add_(size, alpha=_FLOAT32_ROUNDOFF)
    return _largest(error), _largest(error / allowed)


def _largest(values: Tensor) -> float:
    return torch.nan_to_num(values, nan=torch.inf).max().item() if values.numel() else 0.0


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, slice | None]]:
    if not shape:
        yield 0, None
        return
    row = max(1, torch.Size(shape[1:]).numel())
    step = max(1, PIECE_ELEMENTS // row)
    for start in range(0, shape[0], step):
        yield start, slice(start, start + step)
