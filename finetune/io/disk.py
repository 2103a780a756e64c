"""A disk that is full, or cannot be written for another reason of its own: named, with what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import DiskError, FinetuneError, Problem
from finetune.io.sizes import size_text

REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_WORDS = ("no space left on device", "disk quota exceeded", "file too large", "os error 28", "os error 27")
_TORCH = ("pytorchstreamwriter failed", "unexpected pos")  # which names no reason


@contextmanager
def disk_named(place: str | Path, then: str) -> Iterator[None]:
    """Inside, a disk that does not take what is written ends in a DiskError. then: what to do once there is room."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise DiskError(_problem(place, error, reason, then)) from error


def _problem(place: str | Path, error: BaseException, reason: str, then: str) -> Problem:
    path = Path(place).absolute()
    above = next((each for each in (path, *path.parents) if each.exists()), Path("/"))
    named = getattr(error, "filename", None)
    free = size_text(shutil.disk_usage(above).free)
    what = f"cannot be written: {reason} ({free} are free)"
    return Problem(str(named or place), what, f"free some space, then {then}")


def _reason(error: BaseException | None) -> str | None:
    """Why a disk did not take something; None for all other errors. Libraries wrap what the system said."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REASONS:
            return error.strerror
        text = str(error).lower()
        if any(words in text for words in _WORDS):
            return " ".join(str(error).split())[:200]
        if isinstance(error, RuntimeError) and any(words in text for words in _TORCH):
            return "a file could not be written to its end"
        error = error.__cause__ or error.__context__
    return None
