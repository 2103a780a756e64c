"""What we hang on the trainer: metrics, gradient check, checkpoint integrity."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.adapters.trainable import check_gradients
from finetune.errors import Problem, TrainingError
from finetune.training.checkpoints import mark_complete, remove_older
from finetune.training.memory import peak_memory_gib, release_free_memory
from finetune.training.processes import is_main_process, processes
from finetune.training.run_folder import RunFolder

Row = dict[str, Any]
FIGURES = ("router_", "rewards/", "logps/")
"""How the names of an objective's and the routers' own figures begin."""


class GradientCheck(TrainerCallback):
    """Refuses to go on when a group of adapters has no gradient in the first step."""

    def __init__(self) -> None:
        self._checked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called once per optimizer step, gradients complete; looks at the first one only."""
        if not self._checked:
            check_gradients(kwargs["model"])
            self._checked = True


class FreeMemory(TrainerCallback):
    """For models that hardly fit: buffers of ever other sizes leave holes, which would add up from step to step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called once per optimizer step, after all that was done between steps."""
        release_free_memory()


class Metrics(TrainerCallback):
    """Writes metrics.jsonl and hands every row to `listener`.

    A row holds step, loss, learning_rate, grad_norm, tokens (input tokens so far), tokens_per_second (of training
    alone) and elapsed_s (of this process), peak_memory_gib, eval_loss and other figures of held-out rows where they
    were measured, rewards and log-probabilities of both sides of pairs, router_aux_loss, router_z_loss and
    router_kl_to_base (without weights) where they are part of the loss, and samples.
    The first row of a process has seconds_to_first_step: from the loaded model to the end of the step, with all that is
    compiled or chosen before and in it, but without evaluation and samples.
    """

    def __init__(self, folder: RunFolder, listener: Callable[[Row], None], began_s: float | None = None) -> None:
        """began_s: by `time.perf_counter`, when the work before the first step began; as training begins when None."""
        self._folder = folder
        self._listener = listener
        self._began_s = began_s
        self._first: Row | None = None
        self._start_s, self._apart_s = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start_s = time.perf_counter()
        self._began_s = self._start_s if self._began_s is None else self._began_s

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step was over; it reads gradients to the host, so the device has done most of it.

        The last step is always logged, so that every run ends with a loss.
        """
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self._first is None and self._began_s is not None:
            seconds = time.perf_counter() - self._began_s - self._apart_s
            self._first = {"seconds_to_first_step": round(seconds, 3)}
            if is_main_process():
                self._listener({"step": state.global_step, **self._first})

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        """Turn the trainer's log into one row."""
        logs = logs or {}
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(not_finite(kwargs.get("model"), state.global_step, logs["loss"]))
        elapsed_s = time.perf_counter() - self._start_s
        tokens = logs.get("num_tokens", 0.0)
        self.write(
            {
                "step": state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": float(logs["grad_norm"]) if logs.get("grad_norm") is not None else None,
                "tokens": int(tokens),
                "tokens_per_second": round(tokens / (elapsed_s - self._apart_s), 1),
                "elapsed_s": round(elapsed_s, 3),
                **self._take_first(),
                "peak_memory_gib": round(peak_memory_gib(), 3),
                **{name: value for name, value in logs.items() if name.startswith(FIGURES)},
            }
        )

    def _take_first(self) -> Row:
        first, self._first = self._first or {}, {}
        return first

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside is no training."""
        began_s = time.perf_counter()
        yield
        self._apart_s += time.perf_counter() - began_s

    def write(self, row: Row) -> None:
        """Append one row and flush it; of several processes the main one writes."""
        if not is_main_process():
            return
        with self._folder.metrics.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        self._listener(row)


def not_finite(model: Any, step: int, loss: float) -> Problem:
    """Why a loss may be NaN or infinite: a frozen weight that is, or training itself."""
    frozen = [] if model is None else [*model.named_buffers(), *model.named_parameters()]
    for name, weight in frozen:
        if weight.is_floating_point() and not weight.requires_grad and not bool(weight.isfinite().all()):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            hint = "the base model is damaged: copy or download its checkpoint again"
            return Problem(f"step {step}", f"the loss is not finite, for the base's {plain} is not", hint, loss)
    hint = "lower train.learning_rate, look at the rows of this step, or try train.precision=fp32"
    return Problem(f"step {step}", "the loss is not finite", hint, loss)


class Checkpoints(TrainerCallback):
    """Saves every `every` steps, marks each checkpoint complete and removes old ones, but never the best."""

    def __init__(self, folder: Path, every: int | None, keep: int, best_step: Callable[[], int | None]) -> None:
        self._folder, self._every, self._keep, self._best_step = folder, every, keep, best_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is time, and after the last step."""
        if state.global_step >= state.max_steps or (self._every and state.global_step % self._every == 0):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer wrote its files; make them count."""
        processes().wait_for_everyone()  # each has files of its own in the checkpoint
        if state.is_world_process_zero:
            mark_complete(self._folder / f"checkpoint-{state.global_step}")
            remove_older(self._folder, self._keep, self._best_step())
