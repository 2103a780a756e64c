"""A small part of `make chaos`: a killed run goes on to the same bytes, and a full disk is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.proof.chaos import can_mount

ROOT = Path(__file__).parents[2]


def test_a_killed_run_and_a_full_disk():
    if not can_mount():
        pytest.skip("a disk of a few bytes is a file system of its own, which this user may not mount")
    command = [sys.executable, "-W", "ignore", "tests/proof/chaos.py", "--only", "sft", "--steps", "3"]
    command += ["--kills", "1", "--flips", "0", "--cuts", "0", "--disks", "1", "--seed", "1"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "disk: told" in done.stdout
    assert "sft: went on" in done.stdout
