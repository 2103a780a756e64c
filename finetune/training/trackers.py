"""Rows of metrics.jsonl sent to experiment trackers as well, through the callbacks that transformers has for them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from finetune.config.schema import Recipe, Tracker
from finetune.errors import Problem, TrainingError

logger = logging.getLogger(__name__)

PROJECT = "finetune"
TENSORBOARD = "tensorboard"
"""Folder of its event files in a run's."""


class _Recipe:
    """The recipe where a tracker's callback looks for a model's settings, which it shows beside the curves."""

    def __init__(self, recipe: Recipe) -> None:
        self.config = self
        self._settings = {
            f"{section}.{name}": value
            for section, fields in recipe.model_dump(mode="json").items()
            for name, value in fields.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return self._settings

    def to_json_string(self) -> str:
        """The same as text."""
        return json.dumps(self._settings, indent=1)


class Trackers(TrainerCallback):
    """Opens what `train.report_to` names when training begins, gets every row of metrics, closes it at the end.

    A tracker that cannot be opened ends the run before its first step; one that fails later is left out with a
    warning. wandb stays on this machine unless WANDB_MODE says otherwise.
    """

    def __init__(self, names: Sequence[Tracker], run: Path, recipe: Recipe) -> None:
        self._recipe = _Recipe(recipe)
        self._open: dict[str, TrainerCallback] = {}
        for name in names:
            for variable, value in _defaults(run).get(name, {}).items():
                os.environ.setdefault(variable, value)
            (kind,) = get_reporting_integration_callbacks([name])
            with _named(name):
                self._open[name] = kind()
            if name == "tensorboard":
                self._open[name].logging_dir = str(run / TENSORBOARD)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open them."""
        self._at = args, state, control
        for name, tracker in self._open.items():
            with _named(name):
                tracker.on_train_begin(*self._at, model=self._recipe)

    def __call__(self, row: dict[str, Any]) -> None:
        """Send the numbers of a row; the trainer's state has its step."""
        numbers = {name: value for name, value in row.items() if type(value) in (int, float) and name != "step"}
        for name, tracker in list(self._open.items()) if numbers else ():
            try:
                tracker.on_log(*self._at, model=self._recipe, logs=numbers)
            except Exception as error:  # a curve less is no reason to lose a run
                logger.warning("%s gets no more metrics: %s", name, error)
                del self._open[name]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close them."""
        for name, tracker in self._open.items():
            try:
                tracker.on_train_end(*self._at, model=self._recipe)
            except Exception as error:
                logger.warning("%s was not closed: %s", name, error)


def _defaults(run: Path) -> dict[str, dict[str, str]]:
    """Variables that set a tracker up, where the user has not set them."""
    return {
        "wandb": {"WANDB_MODE": "offline", "WANDB_PROJECT": PROJECT, "WANDB_DIR": str(run)},
        "mlflow": {"MLFLOW_EXPERIMENT_NAME": PROJECT},
    }


@contextmanager
def _named(name: str) -> Iterator[None]:
    """An error inside ends the run and says whose it is."""
    try:
        yield
    except Exception as error:
        hint = f"set it up as its own documentation says, or leave {name} out of train.report_to"
        raise TrainingError(Problem(name, f"cannot be opened: {error}", hint)) from error
