"""Which weights an adapter of a packed model is added to, and how far the two choices are from each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.adapters.files import AdapterFiles
from finetune.adapters.frozen import trained_packing
from finetune.config.schema import QuantizeSection
from finetune.errors import AdapterError, Problem
from finetune.models.checkpoint import Checkpoint
from finetune.quant.dequantized import DequantizedCheckpoint

if TYPE_CHECKING:
    from finetune.merging.plan import MergePlan

MergeOnto = Literal["original", "dequantized"]
"""As the base stores them, or as the run saw them: packed, and decoded again."""

SAMPLED = 8
"""Weights of a family that are measured: the error is much the same in all of them."""


@dataclass(frozen=True)
class QuantizationError:
    """Of one family of weights, over the few that were measured: norms as shares of the weights' own.

    error: what packing did to the weights.  delta: what the adapter does to them.
    """

    measured: int
    error: float
    delta: float

    @property
    def ratio(self) -> float:
        """|quantization error| / |delta|."""
        return self.error / self.delta


def packing_of(adapters: Sequence[AdapterFiles]) -> QuantizeSection | None:
    """How the base was packed in the runs of all these adapters; None where they do not say, or not the same."""
    sections = [files.quantize for files in adapters]
    if sections[0] is None or any(other != sections[0] for other in sections):
        return None
    return trained_packing(adapters[0])


def dequantized(checkpoint: Checkpoint, adapters: Sequence[AdapterFiles]) -> DequantizedCheckpoint:
    """The base as the runs of the adapters saw it. Raises AdapterError when they do not say how it was packed."""
    hint = "merge into the original weights: leave --onto out"
    what = "does not say that its base was packed, so there is nothing to dequantize"
    problems = [Problem(str(files.path), what, hint) for files in adapters if files.quantize is None]
    section = None if problems else packing_of(adapters)
    if section is None and not problems:
        what = "was trained on a base packed in another way than that of the first adapter"
        others = [files for files in adapters if files.quantize != adapters[0].quantize]
        problems = [Problem(str(files.path), what, hint, files.quantize) for files in others]
    if problems or section is None:
        raise AdapterError(*problems)
    return DequantizedCheckpoint.of(checkpoint, section)


def quantization_errors(plan: MergePlan) -> dict[str, QuantizationError]:
    """By kind of weight, for those that the run packed and the adapters change; empty for a base in 16 bit."""
    section = packing_of(plan.adapters)
    if section is None:
        return {}
    decoded = DequantizedCheckpoint.of(plan.base, section)
    kinds: dict[str, list[str]] = {}
    for name, kind in plan.kinds.items():
        if decoded.packs(name):
            kinds.setdefault(kind, []).append(name)
    found = {kind: _measure(plan, decoded, names) for kind, names in sorted(kinds.items())}
    return {kind: error for kind, error in found.items() if error is not None}


def _measure(plan: MergePlan, decoded: DequantizedCheckpoint, names: list[str]) -> QuantizationError | None:
    """Over some of the weights that the adapters change, spread over the model; None when they change none."""
    measured, weight, error, delta = 0, 0.0, 0.0, 0.0
    for name in random.Random(0).sample(names, len(names)):
        change = plan.read(name)
        if change is None:
            continue
        stored = decoded.stored.read_float(name)
        measured += 1
        weight += float(stored.square().sum())
        error += float((decoded.read_float(name) - stored).square().sum())
        delta += float(change.rows(slice(None)).square().sum())
        if measured == SAMPLED:
            break
    return QuantizationError(measured, (error / weight) ** 0.5, (delta / weight) ** 0.5) if delta and weight else None


def advice(errors: dict[str, QuantizationError], base: Checkpoint) -> tuple[str, ...]:
    """A warning where packing changed the weights more than the adapters do. base: of the plan."""
    large = [f"{family} {error.ratio:.1f}" for family, error in errors.items() if error.ratio > 1]
    if not large:
        return ()
    what = f"the run packed its base, which changed weights more than the adapter does ({', '.join(large)} times)"
    if isinstance(base, DequantizedCheckpoint):
        return (f"{what}. The merged model has those changes, as the run had: it is what was trained",)
    return (
        f"{what}. The merged model is without those changes: nearer to the base, but not quite what was "
        "trained. Compare it with the model that was: --onto dequantized",
    )
