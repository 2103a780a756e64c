"""Big files written tensor by tensor: several at a time, each at its own place, file by file, resumable.

A file is planned first, down to the offset of every tensor. Then workers fill it; while they fill the next one, it is
made durable, and the journal says so. A run that was killed is continued after the last file in the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from finetune.errors import Problem, UserError
from finetune.models.files import write_json_atomic

Advance = Callable[[str, int], None]
JOURNAL = ".journal.json"
FLUSH_BYTES = 2**26


class Place:
    """Where a tensor's next bytes go in the output file; positioned writes, so that threads share the file.

    turn: held while bytes are written. The system lets one thread at a time write to a file, and the others would spin
    until it is done instead of leaving the core to the arithmetic of the next piece.
    """

    def __init__(self, descriptor: int, position: int, end: int, turn: Lock) -> None:
        self._descriptor, self._position, self._end, self._turn = descriptor, position, end, turn

    def append(self, data: Tensor | memoryview) -> None:
        """Writes the next rows."""
        if isinstance(data, Tensor):
            if not data.numel():
                return
            data = data.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert self._position + len(data) <= self._end, "a tensor is larger than planned"
        done = 0
        with self._turn:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], self._position + done)
        self._position += len(data)

    @property
    def is_full(self) -> bool:
        """Whether all planned bytes are written."""
        return self._position == self._end


@dataclass(frozen=True)
class Output:
    """One tensor of a file.

    start, end: its bytes in the file.  fill: writes them all, in order; what it returns is kept in the journal, so it
    must be JSON.  read_bytes: how much is read for it, for the progress bar.
    """

    name: str
    start: int
    end: int
    fill: Callable[[Place], Any]
    read_bytes: int = 0


@dataclass(frozen=True)
class OutputFile:
    """A file as planned: its first bytes, its tensors, and its size."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]
    size: int


class Journal:
    """Which files of an unfinished folder are complete, and what their tensors reported.

    job: says what is being written from what; a folder left by another job is not continued.
    Raises UserError when the folder holds another job.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._path, self._job = folder / JOURNAL, job
        self._done: dict[str, Any] = {}
        if self._path.exists():
            try:
                content = json.loads(self._path.read_text())
                started, self._done = content["job"], dict(content["done"])
            except (ValueError, LookupError, TypeError):
                raise UserError(Problem(str(self._path), "is damaged", "leave --resume out to start over")) from None
            if started != job:
                hint = "run the same command again, or leave --resume out to start over"
                raise UserError(Problem(str(folder), "was left by a command with other inputs or settings", hint))

    def complete(self, files: Sequence[OutputFile]) -> dict[str, list[Any]]:
        """What the tensors of each file that is complete reported. The rest is forgotten: it will be written over.

        A file that is half written over may have its size already, so the journal must not name it.
        """
        kept = {file.name: self._done[file.name] for file in files if file.name in self._done and self._is_whole(file)}
        if kept.keys() != self._done.keys():
            self._done = kept
            self._save()
        return dict(kept)

    def record(self, file: OutputFile, results: list[Any]) -> None:
        """To be called when the file is on disk."""
        self._done[file.name] = results
        self._save()

    def _is_whole(self, file: OutputFile) -> bool:
        path = self._path.with_name(file.name)
        return path.is_file() and path.stat().st_size == file.size

    def _save(self) -> None:
        write_json_atomic(self._path, {"job": self._job, "done": self._done})

    def close(self) -> None:
        """Everything is written: the journal goes."""
        self._path.unlink(missing_ok=True)


def write_files(
    folder: Path, files: Sequence[OutputFile], journal: Journal, workers: Executor, advance: Advance
) -> dict[str, Any]:
    """Writes all files that the journal does not have, and returns what each tensor reported, by name.

    workers: run the tensors; each thread should use one core.
    advance: called with (file, bytes read) after each tensor, from the calling thread.
    """
    reported: dict[str, Any] = {}
    complete = journal.complete(files)
    with ThreadPoolExecutor(1) as syncer:  # one file goes to the disk while the next is made
        synced = []
        for file in files:
            results = complete.get(file.name)
            if results is None:
                results = _write(folder / file.name, file, workers, advance)
                synced.append(syncer.submit(_make_durable, folder, file, results, journal))
            else:
                advance(file.name, sum(output.read_bytes for output in file.outputs))
            reported |= {output.name: result for output, result in zip(file.outputs, results, strict=True)}
        for task in synced:
            task.result()
    return reported


def _make_durable(folder: Path, file: OutputFile, results: list[Any], journal: Journal) -> None:
    descriptor = os.open(folder / file.name, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    journal.record(file, results)


def _write(path: Path, file: OutputFile, workers: Executor, advance: Advance) -> list[Any]:
    turn = Lock()
    with path.open("wb", buffering=0) as opened:
        Place(opened.fileno(), 0, len(file.header), turn).append(memoryview(file.header))
        tasks = [workers.submit(_fill, output, opened.fileno(), turn) for output in file.outputs]
        results, flushed = [], 0
        try:
            for output, task in zip(file.outputs, tasks, strict=True):
                results.append(task.result())
                advance(file.name, output.read_bytes)
                if output.end - flushed >= FLUSH_BYTES:
                    _start_flushing(opened.fileno(), flushed, output.end)
                    flushed = output.end
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)
            raise
        os.ftruncate(opened.fileno(), file.size)
    return results


def _start_flushing(descriptor: int, start: int, end: int) -> None:
    """Has the system write these bytes to the disk while more are made, so that fsync has little to wait for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def _fill(output: Output, descriptor: int, turn: Lock) -> Any:
    place = Place(descriptor, output.start, output.end, turn)
    result = output.fill(place)
    assert place.is_full, f"{output.name} is smaller than planned"
    return result
