"""Checkpoints that are either complete or not there.

The trainer writes a checkpoint file by file. After the last one a marker with every file's size and sha256 is written;
a folder without a valid marker is what a crash left behind and is never resumed from, nor is one whose files changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from finetune.errors import Problem, UserError
from finetune.models.files import file_digest, write_json_atomic

logger = logging.getLogger(__name__)

MARKER = "complete.json"
DAMAGED = "damaged.json"
"""What the marker of a checkpoint is called whose files changed."""


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of `checkpoint` to disk, then write the marker."""
    sizes, digests = {}, {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (MARKER, DAMAGED)):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        name = file.relative_to(checkpoint).as_posix()
        sizes[name], digests[name] = file.stat().st_size, file_digest(file)
    write_json_atomic(checkpoint / MARKER, {"step": step_of(checkpoint), "sizes": sizes, "sha256": digests})


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file still has the size it had."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damage(checkpoint: Path) -> str | None:
    """The first file that is not what was written, with the reason; None for a whole checkpoint. Reads all of it."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes, digests = marker["sizes"], marker["sha256"]
        expected = [(name, int(sizes[name]), digests[name]) for name in sizes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is missing or damaged"
    if not expected:
        return f"{MARKER} names no file"
    for name, size, digest in expected:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        if file_digest(file) != digest:
            return f"{name} is damaged: its sha256 is not that of what was written"
    return None


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
