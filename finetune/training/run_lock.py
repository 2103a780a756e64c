"""One owner of a run's folder at a time; readers need no lock."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

LOCK = ".run.lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, no other process writes to the run in `folder`, on this machine or where a network file system has locks.

    The lock is the system's: it goes when its process does, however that ends. The file says who has it.
    Raises UserError when another process has it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(_taken(folder)) from None
            logger.warning("%s: this file system has no locks; start no second run in this folder", folder)
        os.ftruncate(descriptor, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_owned(folder: Path) -> bool:
    """Whether a process trains in `folder`; False where the file system does not tell."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _taken(folder: Path) -> Problem:
    try:
        owner = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    hint = "wait for it, or stop it and continue with --resume; output.dir=FOLDER makes another run"
    return Problem(str(folder), f"a run is going on here ({who})", hint)
