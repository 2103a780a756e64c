"""Encoded rows that are kept for the next run, each set in a folder named by the digest of what it was made from.

Entries are filled beside their place and renamed, one process at a time; every file's digest is compared before it is
used. What was used longest ago is removed when there is more than `MOST_BYTES`; a process that reads it keeps it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, UserError
from finetune.models.files import file_digest, sync_folder, write_json_atomic

MOST_BYTES = 20 * 10**9
ENTRY, LOCKS, UNFINISHED = "entry.json", "locks", ".unfinished"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
KEY_LENGTH = 40
Say = Callable[[str], None]


def default_folder() -> Path:
    """Where encoded rows are kept: in FINETUNE_CACHE, or finetune in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("FINETUNE_CACHE"):
        return Path(own).expanduser() / "rows"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "finetune" / "rows"


@dataclass(frozen=True)
class Entry:
    """One set of rows.

    used_s: when it was last used, in seconds since 1970.  facts: what was written beside it, such as its source.
    """

    folder: Path
    size_bytes: int
    used_s: float
    facts: dict[str, Any]


class Cache:
    """The entries of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, make: Callable[[Path], dict[str, Any]], say: Say) -> Path:
        """The folder of an entry, made if it is not there.

        make: fills a folder and returns facts that belong to it; its errors are raised, and nothing is kept then.
        say: gets what a reader should know.
        Raises UserError when the folder cannot be written.
        """
        place = self.folder / key
        if self._is_sound(place, say):
            return place
        with self._only_one(key):
            if self._is_sound(place, lambda text: None):
                return place  # another process made it meanwhile
            building = self.folder / f"{key}{UNFINISHED}-{os.getpid()}"
            with _told(self.folder):
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
            try:
                facts = make(building)
                with _told(self.folder):
                    _finish(building, facts)
                    shutil.rmtree(place, ignore_errors=True)
                    building.rename(place)
                    sync_folder(self.folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        self._evict(place)
        return place

    def entries(self) -> list[Entry]:
        """Every entry, the one used last first."""
        found = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                facts = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append(Entry(folder, size, (folder / ENTRY).stat().st_mtime, dict(facts)))
            except (OSError, ValueError, TypeError):
                continue
        return sorted(found, key=lambda entry: -entry.used_s)

    def clear(self, older_than_s: float = 0.0) -> list[Entry]:
        """Remove entries that were not used for so long, and what killed processes left; those that were removed."""
        now, removed = time.time(), []
        for entry in self.entries():
            if now - entry.used_s >= older_than_s:
                shutil.rmtree(entry.folder, ignore_errors=True)
                removed.append(entry)
        self._sweep()
        return removed

    def _is_sound(self, place: Path, say: Say) -> bool:
        """Whether an entry is there and is what was written; a damaged one is told of."""
        if not place.exists():
            return False
        try:
            digests = json.loads((place / ENTRY).read_text(encoding="utf-8"))["digests"]
            names = {file.name for file in place.iterdir()} - {ENTRY}
            sound = names == set(digests) and all(file_digest(place / name) == digests[name] for name in names)
        except (OSError, ValueError, TypeError, KeyError):
            sound = False
        if sound:
            with suppress(OSError):  # of another user
                os.utime(place / ENTRY)
        else:
            say(f"the rows kept in {place} are damaged: they are encoded anew")
        return sound

    @contextmanager
    def _only_one(self, key: str) -> Iterator[None]:
        """Inside, no other process makes the same entry, where the file system has locks."""
        with _told(self.folder):
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / LOCKS / key, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            yield
        finally:
            os.close(descriptor)

    def _evict(self, kept: Path) -> None:
        """Remove what was used longest ago while there is too much."""
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        for entry in reversed(entries):
            if total <= MOST_BYTES:
                return
            if entry.folder != kept:
                shutil.rmtree(entry.folder, ignore_errors=True)
                total -= entry.size_bytes

    def _sweep(self) -> None:
        """Remove what processes that are gone did not finish."""
        for folder in self.folder.glob(f"*{UNFINISHED}-*") if self.folder.is_dir() else ():
            lock = self.folder / LOCKS / folder.name.partition(UNFINISHED)[0]
            try:
                with lock.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue


def digest_of(facts: Any) -> str:
    """A key for what can be written as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def _finish(folder: Path, facts: dict[str, Any]) -> None:
    names: Sequence[str] = sorted(file.name for file in folder.iterdir())
    for name in names:
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    digests = {name: file_digest(folder / name) for name in names}
    write_json_atomic(folder / ENTRY, facts | {"made": time.strftime("%Y-%m-%d %H:%M:%S"), "digests": digests})


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """An error of the file system inside names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        hint = "make room (finetune cache clear), or name another folder in data.cache, or write data.cache: off"
        raise UserError(Problem(str(folder), f"cannot be written: {error.strerror or error}", hint)) from None
