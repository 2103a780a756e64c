"""How many optimizer steps a run takes, how many of them warm up, and whether those are enough to learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.config.schema import Recipe, TrainSection

FEW = 20
"""A run of fewer steps hardly moves an adapter."""


def warmup_steps(train: TrainSection, total: int) -> int:
    """Steps of rising learning rate; at least one step is left at the peak."""
    return min(math.ceil(train.warmup * total), total - 1)


def total_steps(train: TrainSection, batches: int) -> int:
    """Optimizer steps of a whole run. batches: micro-steps of an epoch, on one of the devices."""
    if train.steps is not None:
        return train.steps
    per_epoch = max(math.ceil(batches / train.gradient_accumulation), 1)
    return math.ceil(per_epoch * train.epochs)


@dataclass(frozen=True)
class Steps:
    """The steps of a run.

    total, warmup: all of them, and those with a rising rate.  units: blocks, or rows, of an epoch.
    per_step: blocks or rows of one step, on all devices.
    """

    recipe: Recipe
    total: int
    warmup: int
    units: int
    per_step: int

    @classmethod
    def of(cls, recipe: Recipe, units: int, devices: int = 1) -> Steps:
        """units: blocks of the training rows, or the rows themselves without packing."""
        train = recipe.train
        micro_step = train.batch_size * devices
        total = total_steps(train, math.ceil(units / micro_step))
        return cls(recipe, total, warmup_steps(train, total), units, micro_step * train.gradient_accumulation)

    def text(self) -> str:
        """`steps: 120, of 8 blocks each; 4 of them warm up; 1 epoch of 960 blocks`."""
        name = "blocks" if self.recipe.packs_rows else "rows"
        epochs = self.total * self.per_step / self.units if self.recipe.train.steps else self.recipe.train.epochs
        each = f"steps: {self.total:,}, of {self.per_step:,} {name} each"
        passes = f"{epochs:,.3g} epoch{'' if epochs == 1 else 's'} of {self.units:,} {name}"
        return f"{each}; {self.warmup:,} of them warm up; {passes}"

    def warnings(self) -> list[str]:
        """That the steps are few, and what makes more of them."""
        train = self.recipe.train
        if train.steps is not None or self.total >= FEW:
            return few_steps(train)
        ways = [f"train.epochs: {math.ceil(FEW * self.per_step / self.units):,}"]
        if train.gradient_accumulation > 1:
            ways.append("a lower train.gradient_accumulation")
        if self.recipe.data.packing:
            ways.append("a lower data.max_length")
        return [f"{_so_many(self.total)}: write {', '.join(ways)}, or add rows"]


def few_steps(train: TrainSection) -> list[str]:
    """That `train.steps` are few, where they decide."""
    few = train.steps is not None and train.steps < FEW
    return [f"{_so_many(train.steps or 0)}: raise train.steps"] if few else []


def _so_many(total: int) -> str:
    return f"{total} step{'s' if total > 1 else ''} hardly move an adapter"
