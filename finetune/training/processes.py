"""The processes of a run: one, or as many as `accelerate launch` or `torchrun` started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from finetune.errors import FinetuneError

T = TypeVar("T")


def processes() -> PartialState:
    """The processes of this run, as `accelerate launch` or `torchrun` started them; they join when first asked for."""
    return PartialState(cpu=not torch.accelerator.is_available())


def load_device() -> torch.device | None:
    """Where a run loads its model: None where it will run, the CPU when several processes may share it out."""
    return None if processes().num_processes == 1 else torch.device("cpu")


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return bool(processes().is_main_process)


def on_main_process(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, in every process; an error of it is raised in every process."""
    state = processes()
    if state.num_processes == 1:
        return work()
    found: list[T | FinetuneError | None] = [None]
    if is_main_process():
        try:
            found = [work()]
        except FinetuneError as error:
            found = [error]
    broadcast_object_list(found)
    (answer,) = found
    if isinstance(answer, FinetuneError):
        raise answer
    return answer  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    found: list[T] = gather_object([value])
    return found


def end_process_group() -> None:
    """A barrier, then the process group is destroyed: a process that exits without may die of its open connections."""
    if (state := processes()).num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
