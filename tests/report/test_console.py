"""What cannot be printed ends nothing."""

import subprocess
import sys

import pytest

PRINTS = """
from finetune.report.console import open_console
console = open_console()
for line in range(20_000):
    console.print(f"step {line} · loss 1.25")
open_console(stderr=True).print("went on")
"""


def printed(command: str, **environment: str) -> subprocess.CompletedProcess:
    shell = f"set -o pipefail; {sys.executable} -c '{PRINTS}' {command}"
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, env=environment or None)


@pytest.mark.parametrize("command", ["| head -1", "> /dev/full", ">&-"])
def test_a_run_whose_output_nobody_takes_goes_on(command):
    result = printed(command)
    assert result.returncode in (0, 120), result.stderr  # 120: Python itself cannot flush a full disk as it exits
    assert "went on" in result.stderr
    assert "Traceback" not in result.stderr


def test_characters_that_the_output_does_not_have_are_replaced():
    result = printed("| tail -1", PYTHONIOENCODING="ascii", PATH="/usr/bin:/bin", PYTHONPATH=":".join(sys.path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "step 19999 ? loss 1.25"
