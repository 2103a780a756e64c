"""What the trainer needs to know of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

Batch = dict[str, Any]
Row = dict[str, Any]
Collate = Callable[[Any], Batch]


class Objective(Protocol):
    """The rows, batches, losses and figures of a run."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of its data set that reach the collator."""

    def dataset(self, rows: Any) -> Any:
        """Prepared rows as the trainer takes them: a `datasets.Dataset` with `columns`."""

    def sequences(self, rows: Any) -> Any:
        """The sequences that the model reads of prepared rows: each with input_ids and labels."""

    def collator(self, collate: Collate) -> Collate:
        """TRL's collator, and what else a batch has to know."""

    def begin(self, model: PeftModel, accelerator: Accelerator, data: Any) -> Any:
        """Called once before training; returns the data set, perhaps with what was computed of its rows."""

    def units(self, batches: Sequence[Batch]) -> int | None:
        """What the loss of an optimizer step is a mean over, in this process; None for labels, which are counted."""

    def reference(self, batch: Batch) -> Any:
        """What the frozen model makes of a micro-batch, where the loss needs it; before the forward that trains."""

    def loss(self, model: Any, batch: Batch, reference: Any) -> Tensor:
        """The loss of a micro-batch, summed over its units."""

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures of the training rows by name, means since they were last asked for, over all processes."""

    def evaluate(self, model: PeftModel, rows: Any) -> dict[str, float]:
        """Figures of held-out rows by name, which do not depend on batch sizes; `loss` is one of them."""
