"""Direct preference optimization. The reference is the model itself with its adapters off: no second model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from finetune.config.schema import Recipe
from finetune.data.feedback.sequences import Sequences, paired
from finetune.models.scoring import IGNORED, score_rows
from finetune.training.objectives.objective import Batch, Collate
from finetune.training.objectives.pairs import (
    COLUMNS,
    PAIRS,
    REFERENCE,
    PairCollator,
    sequences_apart,
    sums_of_sequences,
    without_pairs,
)
from finetune.training.objectives.preference_loss import pair_losses

FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


class Dpo:
    """Pairs of answers, of which the better one is to become likelier than under the frozen model.

    Log-probabilities are summed over the tokens that carry loss; for ipo, averaged.
    """

    columns = COLUMNS

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._section = recipe, recipe.dpo
        self._sums = PairSums()
        self._held_out: Tensor | None = None

    def dataset(self, rows: Any) -> Any:
        """A row for each pair, with both sequences in it."""
        return paired(rows)

    def sequences(self, rows: Any) -> Any:
        """Both sequences of each pair, one behind the other."""
        return Sequences(rows, "preference")

    def collator(self, collate: Collate) -> Collate:
        """One that keeps the sequences of pairs apart."""
        return PairCollator(collate, flat=self._recipe.data.packing)

    def begin(self, model: PeftModel, accelerator: Accelerator, data: Any) -> Any:
        """With `dpo.reference: cached`, what the frozen model makes of every pair, as another column."""
        self._model, self._accelerator = model, accelerator
        if self._section.reference == "live":
            return data
        pairs = [part for row in data for part in sequences_apart(row)]
        blank = [not any(label != IGNORED for label in part["labels"]) for part in pairs]
        with model.disable_adapter(), accelerator.autocast():
            scores = iter(score_rows(model, [part for part, empty in zip(pairs, blank, strict=True) if not empty]))
        known = iter([0.0 if empty else -next(scores).nll for empty in blank])
        return data.add_column(REFERENCE, [[next(known) for _ in lengths] for lengths in data["seq_lengths"]])

    def units(self, batches: Sequence[Batch]) -> int:
        """The pairs."""
        return sum(len(batch[PAIRS]) for batch in batches)

    def reference(self, batch: Batch) -> Tensor:
        """Log-probabilities (pairs, 2) of both sides under the frozen model."""
        if REFERENCE in batch:
            known: Tensor = batch[REFERENCE]
            return known
        training = self._model.training
        self._model.eval()  # nothing is counted of what trains
        try:
            stance = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), self._model.disable_adapter(), self._accelerator.autocast(), stance:
                return self._log_probs(self._model, batch)
        finally:
            self._model.train(training)

    def loss(self, model: Any, batch: Batch, reference: Tensor) -> Tensor:
        """The sum of the losses of the pairs."""
        logps = self._log_probs(model, batch)
        ratios = logps - reference.to(logps.device, logps.dtype)
        self._sums.add(logps.detach(), self._section.beta * ratios.detach())
        if self._section.loss == "ipo":
            labels = (batch["labels"][:, 1:] != IGNORED).to(ratios.dtype)
            ratios = ratios / sums_of_sequences(labels, batch)
        return pair_losses(ratios[:, 0] - ratios[:, 1], self._section).sum()

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Rewards of both sides, how often the chosen one's is higher, and log-probabilities."""
        return self._sums.take(accelerator)

    def evaluate(self, model: PeftModel, rows: Any) -> dict[str, float]:
        """The loss per pair, figures as of training rows, and in how many pairs the chosen answer is likelier."""
        base = self._of_base(model, rows)
        logps, tokens = _scores(model, self.sequences(rows))
        ratios = logps - base
        margins = ratios / tokens if self._section.loss == "ipo" else ratios
        losses = pair_losses(margins[:, 0] - margins[:, 1], self._section)
        sums = PairSums()
        sums.add(logps, self._section.beta * ratios)
        return {"loss": float(losses.mean()), **sums.means(), **_preference(logps)}

    def _log_probs(self, model: Any, batch: Batch) -> Tensor:
        """Of both sides of each pair (pairs, 2), in the order chosen, rejected."""
        outputs = model(**{**without_pairs(batch), "use_cache": False}, fused_lm_head=True)
        return sums_of_sequences(outputs.log_probs, batch)

    def _of_base(self, model: PeftModel, rows: Any) -> Tensor:
        """Log-probabilities of held-out rows under the frozen model, which are computed once."""
        if self._held_out is None:
            with model.disable_adapter():
                self._held_out, _ = _scores(model, self.sequences(rows))
        return self._held_out


def _scores(model: PeftModel, sequences: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and numbers of tokens with loss of pairs of sequences, both (pairs, 2), in float64."""
    scores = score_rows(model, list(sequences))
    logps = torch.tensor([-score.nll for score in scores], dtype=torch.float64)
    return logps.view(-1, 2), torch.tensor([score.tokens for score in scores]).view(-1, 2)


def _preference(logps: Tensor) -> dict[str, float]:
    return {"preference_accuracy": float((logps[:, 0] > logps[:, 1]).double().mean())}


@dataclass
class PairSums:
    """Sums over pairs since they were last asked for, on the device."""

    pairs: int = 0
    sums: Tensor | None = None

    def add(self, logps: Tensor, rewards: Tensor) -> None:
        """The pairs of one micro-batch: both (pairs, 2), detached."""
        margins = rewards[:, 0] - rewards[:, 1]
        columns = (rewards[:, 0], rewards[:, 1], margins, (margins > 0).to(margins.dtype), logps[:, 0], logps[:, 1])
        new = torch.stack([column.double().sum() for column in columns])
        self.pairs += len(logps)
        self.sums = new if self.sums is None else self.sums + new

    def means(self) -> dict[str, float]:
        """By name, of this process."""
        assert self.sums is not None
        return dict(zip(FIGURES, (self.sums / max(self.pairs, 1)).tolist(), strict=True))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """By name, of all processes; and begin anew."""
        if self.sums is None:
            return {}
        counted = torch.cat([self.sums, self.sums.new_tensor([self.pairs])])
        *sums, pairs = accelerator.reduce(counted, "sum").tolist()
        self.pairs, self.sums = 0, None
        return {name: value / max(pairs, 1) for name, value in zip(FIGURES, sums, strict=True)}
