"""The sha256 of every file of a folder, beside them: what was written is told from what is there now."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.models.files import file_digest, write_json_atomic

MARKER = "complete.json"
DAMAGED = "damaged.json"
"""What the marker of a checkpoint is called whose files changed."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write_marker(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Flush every file of `folder` to disk, then write the marker. facts: further fields of it."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, DAMAGED)):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    digests = dict(zip(sizes, _digests([folder / name for name in sizes]), strict=True))
    write_json_atomic(folder / MARKER, {**(facts or {}), "sizes": sizes, "sha256": digests})


def has_sizes(folder: Path) -> bool:
    """Whether the marker is there and every file still has the size it had."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except _UNREADABLE:
        return False


def damage(folder: Path, names: Iterable[str] | None = None, marker: str = MARKER) -> str | None:
    """The first file that is not what was written, with the reason; None for a whole folder.

    Reads all files that the marker names, or those of `names` alone.
    """
    try:
        content = json.loads((folder / marker).read_text(encoding="utf-8"))
        sizes, digests = content["sizes"], content["sha256"]
        expected = {name: (int(sizes[name]), str(digests[name])) for name in sizes}
    except _UNREADABLE:
        return f"{marker} is missing or damaged"
    if not expected or sizes.keys() != digests.keys():
        return f"{marker} names no file, or not the same ones twice"
    kept = [name for name in expected if names is None or name in names]
    for name in kept:
        file, size = folder / name, expected[name][0]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
    for name, digest in zip(kept, _digests([folder / name for name in kept]), strict=True):
        if digest != expected[name][1]:
            return f"{name} is damaged: its sha256 is not that of what was written"
    return None


def _digests(files: list[Path]) -> list[str]:
    """Of several files at a time: hashing releases the interpreter, and takes 1 to 2 GB a second on a core."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
        return list(workers.map(file_digest, files))
