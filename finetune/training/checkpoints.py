"""Checkpoints that are either complete or not there.

The trainer writes a checkpoint file by file. After the last one a marker with every file's size and sha256 is written;
a folder without a valid marker is what a crash left behind and is never resumed from, nor is one whose files changed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from finetune.errors import Problem, UserError
from finetune.models.digests import DAMAGED, MARKER, damage, has_sizes, write_marker

logger = logging.getLogger(__name__)


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of `checkpoint` to disk, then write the marker."""
    write_marker(checkpoint, {"step": step_of(checkpoint)})


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file still has the size it had."""
    return has_sizes(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The optimizer step a `checkpoint-N` folder was taken at."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """Every `checkpoint-N` folder, oldest first, complete or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=step_of)


def newest_complete(folder: Path) -> Path:
    """The checkpoint to resume from. Errors when there is none."""
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        if is_complete(checkpoint):
            return checkpoint
    what = "no checkpoint is complete" if found else "holds no checkpoint"
    raise UserError(Problem(str(folder), what, "run without --resume (and with --overwrite) to start anew"))


def set_damaged_aside(folder: Path) -> None:
    """Reads the newest checkpoints until one is whole; those before it are complete no more, with a warning for each.

    Raises UserError with what is wrong with each when all that were complete are damaged.
    """
    hint = "restore the file, or run without --resume (and with --overwrite) to start anew"
    problems, markers = [], []
    for checkpoint in reversed(list_checkpoints(folder)):
        if not (checkpoint / MARKER).exists():
            continue
        fault = damage(checkpoint)
        if fault is None:
            break
        problems.append(Problem(str(checkpoint), f"cannot be resumed: {fault}", hint))
        markers.append(checkpoint / MARKER)
    else:
        if problems:
            raise UserError(*problems)
    for problem, marker in zip(problems, markers, strict=True):
        marker.replace(marker.with_name(DAMAGED))
        logger.warning("%s %s; going on from %s", problem.where, problem.what, checkpoint)


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def remove_older(folder: Path, keep: int, best_step: int | None = None) -> None:
    """Keep the `keep` newest complete checkpoints and that of `best_step`; everything older or incomplete goes."""
    complete = [path for path in list_checkpoints(folder) if is_complete(path)]
    kept = {*complete[-keep:], *(path for path in complete if step_of(path) == best_step)}
    for checkpoint in list_checkpoints(folder):
        if checkpoint not in kept:
            (checkpoint / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
