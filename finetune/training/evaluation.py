"""Held-out rows scored while a run trains, the best checkpoint, and when there is no use in going on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from finetune.config.schema import TrainSection
from finetune.training.callbacks import Metrics, Row
from finetune.training.objectives.objective import Objective
from finetune.training.processes import gathered


class Evaluations:
    """The evaluations of a run so far.

    rows: of metrics.jsonl; those without an evaluation are passed over.
    """

    def __init__(self, section: TrainSection, rows: Sequence[Row] = ()) -> None:
        self._section = section
        self._rows = [row for row in rows if "eval_loss" in row]

    def add(self, row: Row) -> None:
        """One more."""
        self._rows.append(row)

    @property
    def best(self) -> Row | None:
        """The first of the best by `train.keep_best`; None where that is null. Untrained, a model has no checkpoint."""
        metric, trained = self._section.keep_best, [row for row in self._rows if row["step"] > 0]
        if metric is None or not trained:
            return None
        sign = {"loss": 1, "exact_match": -1}[metric]
        return min(trained, key=lambda row: sign * row[f"eval_{metric}"])

    @property
    def best_step(self) -> int | None:
        """Whose checkpoint is kept, and used in the end."""
        return None if self.best is None else int(self.best["step"])

    @property
    def gave_up(self) -> bool:
        """Whether the last `train.patience` evaluations are all behind the best."""
        best, patience = self.best_step, self._section.patience
        return best is not None and patience is not None and sum(r["step"] > best for r in self._rows) >= patience


class Evaluation(TrainerCallback):
    """Scores held-out rows before the first step, every so many and at the end, whatever the batch sizes.

    The step that is the best so far gets a checkpoint; a run that has not become better for long ends early.
    """

    def __init__(
        self, objective: Objective, rows: Any, section: TrainSection, metrics: Metrics, found: Evaluations
    ) -> None:
        self._objective, self._rows, self._section, self._metrics, self._found = (
            objective,
            rows,
            section,
            metrics,
            found,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the base can do."""
        if self._section.eval_first and state.global_step == 0:
            self._evaluate(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when it is time."""
        step, every = state.global_step, self._section.eval_every
        if not (step >= state.max_steps or (every and step % every == 0)):
            return
        self._evaluate(kwargs["model"], step)
        if self._found.best_step == step:
            control.should_save = True
        elif self._found.gave_up:
            control.should_training_stop = control.should_log = True
            state.max_steps = step  # for callbacks after this one it is the last step

    def _evaluate(self, model: Any, step: int) -> None:
        with self._metrics.apart():
            figures = self._objective.evaluate(model, self._rows)
        row = {"step": step, **{f"eval_{name}": value for name, value in figures.items()}}
        (row, *_) = gathered(row)  # rounding differs between cards, and all have to decide the same
        self._found.add(row)
        self._metrics.write(row)
