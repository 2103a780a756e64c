"""What a run fetches and writes."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.architecture.shape import ModelShape
from finetune.config.schema import Recipe
from finetune.planning.trained import Trained


@dataclass(frozen=True)
class Disk:
    """Bytes.

    download: of a model that is not here, in 16 bit; 0 for one that is.
    adapter: as stock PEFT reads it, frozen experts with zeros.
    checkpoints: all that are kept, with the optimizer's state; one more lies there while it is written.
    merged: the model that `finetune merge` writes, in 16 bit.
    """

    download: int
    adapter: int
    checkpoints: int
    merged: int

    @property
    def run(self) -> int:
        """Of the run's folder at most."""
        return self.adapter + self.checkpoints


def plan_disk(recipe: Recipe, shape: ModelShape, trained: Trained, *, local: bool) -> Disk:
    """Of a run whose model is here or not."""
    experts = trained.experts
    if recipe.experts.mode == "lora" and trained.experts_per_layer:
        experts = experts * shape.experts // trained.experts_per_layer
    adapter = 4 * (trained.outside + experts)
    state = trained.total * (2 if "8bit" in recipe.train.optimizer else 8)
    model = 2 * shape.parameters()
    return Disk(0 if local else model, adapter, (recipe.train.keep + 1) * (adapter + state), model)
