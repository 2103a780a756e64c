"""A model folder, the whole of it: check the place, stream the files, add the side files, put the folder in place."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import Problem, UserError
from finetune.io.sizes import size_text
from finetune.io.stream import Journal, OutputFile, write_files
from finetune.io.workers import exact_workers
from finetune.models.checkpoint import CONFIG, Checkpoint
from finetune.models.files import check_target, finished_folder, write_atomic

Progress = Callable[[str, int, int], None]
SPARE_BYTES = 2**26


@dataclass(frozen=True)
class Work:
    """A folder to write.

    source: the checkpoint it is made from, which must stay as it is.  files: the large ones.  side: the small ones by
    name, content or file to copy, an index last.  job: see `describe_job`.  resume: continue what a killed run left.
    """

    output: Path
    source: Checkpoint
    files: tuple[OutputFile, ...]
    side: dict[str, bytes | Path]
    job: str
    resume: bool = False


def write_folder(work: Work, progress: Progress | None = None) -> dict[str, Any]:
    """Writes it, and returns what each tensor reported, by name. The folder appears when it is complete.

    Raises UserError when the output is taken, lies in the source's folder, or does not fit on the disk.
    """
    check_output(work.output, work.source)
    _check_space(work)
    with finished_folder(work.output, resume=work.resume) as folder, exact_workers() as workers:
        journal = Journal(folder, work.job)
        reported = write_files(folder, work.files, journal, workers, _advance(work, progress))
        for name, content in work.side.items():
            write_atomic(folder / name, content if isinstance(content, bytes) else _copier(content))
        journal.close()
        _check_complete(folder, work)
    return reported


def check_output(output: Path, base: Checkpoint) -> None:
    """Raises UserError unless `output` is free, and neither the base nor inside it."""
    check_target(output)
    inside, outside = output.resolve(), base.path.resolve()
    if inside.is_relative_to(outside):
        raise UserError(Problem(str(output), "lies in the base model's folder", "name a folder outside of it"))


def describe_job(*settings: Any, folders: Sequence[Path]) -> str:
    """A digest of a command's settings and of size and time of every file it reads."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for folder in folders:
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            state = file.stat()
            digest.update(f"\n{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _copier(path: Path) -> Callable[[BinaryIO], None]:
    def copy(target: BinaryIO) -> None:
        with path.open("rb") as source:
            shutil.copyfileobj(source, target)

    return copy


def side_contents(source: Checkpoint, dtype: str | None, config: bytes | None = None) -> dict[str, bytes | Path]:
    """Every side file of the source, byte for byte but for the dtype in config.json.

    dtype: what config.json is to name, None to leave it.  config: takes the place of config.json.
    """
    config = config or (source.path / CONFIG).read_bytes()
    if dtype is not None:
        config = with_dtype(config, dtype)
        content = json.loads(config)
        if source.fp8_block is not None and content.pop("quantization_config", None) is not None:
            config = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return {**{name: source.path / name for name in source.side_files}, CONFIG: config}


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with its dtype replaced and every other byte as it was; unchanged where it names no dtype."""
    before = json.loads(config)
    for match in re.finditer(rb'"(torch_dtype|dtype)"\s*:\s*("[^"]*"|null)', config):
        key = match[1].decode()
        after = config[: match.start(2)] + json.dumps(dtype).encode() + config[match.end(2) :]
        if key in before and json.loads(after) == {**before, key: dtype} and before[key] != dtype:
            return with_dtype(after, dtype)
    return config


def _check_space(work: Work) -> None:
    needed = sum(file.size for file in work.files) + sum(map(_size, work.side.values()))
    unfinished = work.output.with_name(f".{work.output.name}.unfinished")
    if unfinished.is_dir():  # what a killed run left is used or removed first
        needed -= 512 * sum(file.stat().st_blocks for file in unfinished.iterdir() if file.is_file())
    existing = next(parent for parent in work.output.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        what = f"needs {size_text(needed + SPARE_BYTES)} on this disk, where {size_text(free)} are free"
        raise UserError(Problem(str(work.output), what, "free some space, or name a folder on another disk"))


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _check_complete(folder: Path, work: Work) -> None:
    """Nothing but what was planned is in the folder: what another version left in it is removed."""
    planned = {file.name for file in work.files} | work.side.keys()
    for path in folder.iterdir():
        if path.name not in planned:
            path.unlink()
    assert {path.name for path in folder.iterdir()} == planned


def _advance(work: Work, progress: Progress | None) -> Callable[[str, int], None]:
    total = sum(output.read_bytes for file in work.files for output in file.outputs)
    done = 0

    def advance(file: str, num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(file, done, total)

    return advance
