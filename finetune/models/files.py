"""Writing so that nothing half-written ever looks finished, and names that stay inside their folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from finetune.errors import ModelError, Problem, UserError


def write_atomic(path: str | Path, data: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes `path` so that readers see the old file or the whole new one, also after a crash.

    data: the bytes, or a function that writes them to the open file it is given.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json_atomic(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON with `write_atomic`. NaN and infinity are refused (ValueError)."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def file_digest(path: str | Path) -> str:
    """Sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(path: str | Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safe_child(folder: str | Path, name: str, *, hub_links: bool = False, error: type[UserError] = ModelError) -> Path:
    """`folder / name`, for names that come out of a file.

    Absolute names, `..` and symlinks that leave the folder raise `error`. With `hub_links`, a link from a
    hub cache's `snapshots/<commit>` into the `blobs` of the same repository is followed.
    """
    folder = Path(folder)
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or "\\" in name or name.startswith("/") or ".." in parts:
        raise error(
            Problem(str(folder), "a name leads out of the folder", "use the file names inside the folder only", name)
        )
    path = folder.joinpath(*parts)
    inside = folder.resolve()
    target = path.resolve()
    if target.is_relative_to(inside) or (hub_links and _hub_blobs(inside, target)):
        return path
    hint = "put the file itself into the folder instead of a link"
    raise error(Problem(str(path), "a symlink leads out of the folder", hint, str(target)))


def _hub_blobs(snapshot: Path, target: Path) -> bool:
    return snapshot.parent.name == "snapshots" and target.parent == snapshot.parent.parent / "blobs"


@contextmanager
def finished_folder(target: str | Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `target` in one rename when the block ends without an error.

    Until then it is called `.<name>.unfinished` beside the target, so a kill at any moment leaves nothing
    that looks finished; what a killed run left is removed by the next one, or found in the folder with `resume`.
    An error removes it as well, but not with `resume`: some of it is the work of the run before. `target` may be
    absent or an empty folder, and with `overwrite` any folder; a symlink or a file is refused.
    Raises UserError when the target is taken, or another process is filling it.
    """
    target = Path(target).absolute()
    check_target(target, overwrite=overwrite)
    building = target.with_name(f".{target.name}.unfinished")
    if building.is_symlink():
        raise UserError(Problem(str(building), "is a symlink", "remove it"))
    try:
        building.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "name a folder that can be made"
        raise UserError(Problem(str(target), f"cannot be made ({error.strerror})", hint)) from None
    lock = os.open(building, os.O_RDONLY)
    try:
        _lock(lock, building)
        if not resume:
            _empty(building)
        try:
            yield building
            sync_folder(building)
            check_target(target, overwrite=overwrite)
            _put_in_place(building, target)
        except BaseException:
            if not resume:
                shutil.rmtree(building, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def check_target(target: str | Path, *, overwrite: bool = False) -> None:
    """Raises UserError unless `target` is free for a new folder: absent, or an empty folder."""
    target = Path(target)
    hint = "name a new folder, or remove this one first"
    if target.name in ("", ".."):
        raise UserError(Problem(str(target), "does not name a folder", "end the path with the new folder's name"))
    if target.is_symlink():
        raise UserError(Problem(str(target), "is a symlink, which is never written through", hint))
    if target.exists() and not target.is_dir():
        raise UserError(Problem(str(target), "exists and is not a folder", hint))
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(Problem(str(target), "exists and is not empty", hint))


def check_target_file(target: str | Path) -> None:
    """Raises UserError unless a file can be written at `target`; folders above it are made."""
    target = Path(target)
    hint = "end the path with the name of a file, in a folder that can be written to"
    if target.is_dir():
        raise UserError(Problem(str(target), "is a folder", hint))
    if target.exists() and not target.is_file():
        raise UserError(Problem(str(target), "is a device or a pipe, which would be replaced", hint))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(str(target), f"cannot be written ({error.strerror})", hint)) from None
    if not os.access(target.parent, os.W_OK):
        raise UserError(Problem(str(target), "cannot be written", hint))


def _put_in_place(building: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    if target.is_dir() and any(target.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    building.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _lock(descriptor: int, building: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "wait for it, or name another folder"
        raise UserError(Problem(str(building), "another process is filling this folder", hint)) from None


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
