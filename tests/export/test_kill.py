"""kill -9 in the middle of a merge: at every durable step and all along the shards."""

import subprocess
import sys

from tests.export.checkpoints import ATTENTION, EXPERTS, MOE, write_adapter, write_base

# One process forks a merge per moment of death, so that torch is imported once.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from finetune.export.merge import merge

adapter, folder = sys.argv[1], Path(sys.argv[2])

def attempt(output, deadline=None):
    '''Merges in a child that kills itself at its deadline-th step; returns the number of steps, or None if it died.'''
    read, write = os.pipe()
    if not (child := os.fork()):
        steps = 0
        def step(*_):
            nonlocal steps
            steps += 1
            if steps == deadline:
                os.kill(os.getpid(), signal.SIGKILL)
        sync = os.fsync
        os.fsync = lambda descriptor: (step(), sync(descriptor), step())
        merge(adapter, output, dtype="fp32", progress=step)
        os.write(write, str(steps).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    told = os.read(read, 20)
    os.close(read)
    assert told or os.WTERMSIG(status) == signal.SIGKILL
    return int(told) if told else None

def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}

steps = attempt(folder / "whole")
whole = content(folder / "whole")
killed = finished = 0
moments = sorted({*range(1, steps, max(1, steps // 6)), *range(steps - 7, steps + 1)})
for moment in moments:
    output = folder / "out"
    assert attempt(output, moment) is None
    killed += 1
    if output.exists():
        finished += 1
        assert content(output) == whole, moment
    else:
        left = [path.name for path in folder.iterdir()]
        assert sorted(left) in (["whole"], [".out.unfinished", "whole"]), left
        attempt(output)
        assert content(output) == whole, moment
    for file in output.iterdir():
        file.unlink()
    output.rmdir()
    assert [path.name for path in folder.iterdir()] == ["whole"]
print(killed, finished)
"""


def test_a_killed_merge_never_looks_finished(tmp_path):
    base = write_base(tmp_path / "base", MOE, shards=3)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=ATTENTION, target_parameters=EXPERTS)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(adapter), str(tmp_path / "work")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    killed, finished = map(int, result.stdout.split())
    assert killed >= 14
    assert 1 <= finished <= 3  # only deaths after the rename
