"""The processes of a run: one, or as many as `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes of this run, as `accelerate launch` or `torchrun` started them; they join when first asked for."""
    return PartialState(cpu=not torch.accelerator.is_available())


def load_device() -> torch.device | None:
    """Where a run loads its model: None where it will run, the CPU when several processes may share it out."""
    return None if processes().num_processes == 1 else torch.device("cpu")


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return bool(processes().is_main_process)


def end_process_group() -> None:
    """A barrier, then the process group is destroyed: a process that exits without may die of its open connections."""
    if (state := processes()).num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
