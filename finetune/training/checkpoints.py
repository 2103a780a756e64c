"""Checkpoints that are either complete or not there.

The trainer writes a checkpoint file by file. After the last one a marker with every file's size is written; a
folder without a valid marker is what a crash left behind and is never resumed from.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from finetune.errors import Problem, UserError
from finetune.models.files import write_json_atomic

MARKER = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of `checkpoint` to disk, then write the marker."""
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(checkpoint).as_posix()] = file.stat().st_size
    write_json_atomic(checkpoint / MARKER, {"step": step_of(checkpoint), "sizes": sizes})


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file still has the size it had."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


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


def remove_older(folder: Path, keep: int) -> None:
    """Keep the `keep` newest complete checkpoints; everything older or incomplete goes."""
    complete = [path for path in list_checkpoints(folder) if is_complete(path)]
    kept = set(complete[-keep:])
    for checkpoint in list_checkpoints(folder):
        if checkpoint not in kept:
            (checkpoint / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
