"""Supervised fine-tuning: the negative log-likelihood of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from finetune.config.schema import Recipe
from finetune.data.packing import packed
from finetune.models.scoring import Score, score_rows
from finetune.training.objectives.objective import Batch, Collate
from finetune.training.token_loss import NamesScored


class Sft:
    """Rows with answers, packed into blocks or one by one."""

    columns = ("input_ids", "labels", "seq_lengths")

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def dataset(self, rows: Any) -> Any:
        """Blocks with packing, the rows themselves without."""
        return packed(rows, self._recipe.data.max_length) if self._recipe.packs_rows else rows

    def sequences(self, rows: Any) -> Any:
        """The rows themselves."""
        return rows

    def collator(self, collate: Collate) -> Collate:
        """One whose batches say which tokens predict a labelled one."""
        return NamesScored(collate)

    def begin(self, model: PeftModel, accelerator: Accelerator, data: Any) -> Any:
        """Nothing is to be done."""
        return data

    def units(self, batches: Sequence[Batch]) -> int | None:
        """The labels."""
        return None

    def reference(self, batch: Batch) -> None:
        """None is needed."""

    def loss(self, model: Any, batch: Batch, reference: None) -> Tensor:
        """The summed negative log-likelihood of the labels."""
        outputs = model(**{**batch, "use_cache": False}, fused_lm_head=True)
        loss: Tensor = -outputs.log_probs.sum()
        return loss

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """The loss says it all."""
        return {}

    def evaluate(self, model: PeftModel, rows: Any) -> dict[str, float]:
        """Loss per label, and the share of rows that greedy decoding would answer exactly."""
        score = Score.of(score_rows(model, list(rows)))
        return {"loss": score.loss, "exact_match": score.exact_match}
