"""Ends that come from outside: a signal to stop, and other processes of a run that are gone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from transformers import TrainerCallback

from finetune.errors import Problem, StoppedError, TrainingError
from finetune.training.processes import gathered, processes


class StopOnSigterm(TrainerCallback):
    """After SIGTERM the step is finished, a checkpoint saved and training ended, as schedulers and spot machines need.

    Several processes agree at each logged step, since a signal may reach them in different ones.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None
        """The step after which training ended for it; None while it did not."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM only asks. Signals are the main thread's; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, unless this was the last step anyway."""
        asked = self.asked
        if processes().num_processes > 1:
            asked = state.global_step % args.logging_steps == 0 and any(gathered(self.asked))
        if asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def check(self, run: Path) -> None:
        """Raises StoppedError when training ended for a signal."""
        if self.stopped_at is not None:
            what = "stopped by SIGTERM; a checkpoint is saved"
            raise StoppedError(Problem(f"step {self.stopped_at}", what, f"continue: finetune resume {run}"))


@contextmanager
def lost_processes_named(run: Path) -> Iterator[None]:
    """Inside, what a backend says when another process of the run is gone becomes an error that says so."""
    try:
        yield
    except RuntimeError as error:
        if processes().num_processes == 1 or not _is_loss(error):
            raise
        hint = f"its own message says why; continue with as many processes: finetune resume {run}"
        raise TrainingError(Problem(str(run), "another process of the run ended", hint)) from error


def _is_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, DistError) or any(words in text for words in ("closed by peer", "reset by peer", "gloo"))
