"""A disk that takes no more is named, whoever was writing, and nothing is put in the place of a device."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.errors import DiskError, RunError, UserError
from finetune.io.disk import disk_named
from finetune.models.files import check_target_file, write_atomic

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def wrapped():
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise ValueError("could not save") from error


WRITERS = {
    "the system": lambda: FULL.write_bytes(b"x"),
    "torch": lambda: torch.save(torch.zeros(2**18), FULL),
    "a library around it": wrapped,
}


@needs_full
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named(name, tmp_path):
    with pytest.raises(DiskError, match="are free") as caught, disk_named(tmp_path / "run", "go on"):
        WRITERS[name]()
    assert issubclass(DiskError, RunError)  # exit code 1
    (problem,) = caught.value.problems
    assert problem.where in (str(tmp_path / "run"), str(FULL))
    assert problem.hint == "free some space, then go on"


def test_other_errors_stay_what_they_are():
    with pytest.raises(KeyError), disk_named("run", "go on"):
        raise KeyError("no space")


@needs_full
def test_output_into_a_full_disk():
    command = [sys.executable, "-m", "finetune", "schema"]
    with FULL.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "the output: cannot be read or written: No space left on device\nhint: " in done.stderr
    assert "nexpected" not in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_takes_the_place_of_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a device or a pipe"):
        check_target_file(tmp_path / "pipe")


def test_what_did_not_fit_is_not_left_behind(tmp_path):
    def fill(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="space"):
        write_atomic(tmp_path / "a", fill)
    assert not list(tmp_path.iterdir())
