"""kill -9 in the middle of a merge or an export: at durable steps and all along the files, then --resume."""

import subprocess
import sys

import pytest

from tests.checkpoints import ATTENTION, EXPERTS, MOE, write_adapter, write_base

# One process forks a job per moment of death, so that torch is imported once.
SCRIPT = """
import itertools, os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from finetune.merging.merge import merge

kind, source, folder, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])

def job(output, progress, resume):
    if kind == "merge":
        merge(source, output, dtype="fp32", progress=progress, resume=resume)
    else:
        from finetune.formats.export import export
        from finetune.formats.rounded import Fp8
        export(source, output, Fp8(shard_gb=6e-5) if kind == "fp8" else kind, progress=progress, resume=resume)

def attempt(output, deadline=None, resume=False):
    '''Runs it in a child that kills itself at its deadline-th step; returns the number of steps, or None if it died.'''
    read, write = os.pipe()
    if not (child := os.fork()):
        steps = itertools.count(1)
        def step(*_):  # one thread writes the next file, while another makes the last one durable
            if next(steps) == deadline:
                os.kill(os.getpid(), signal.SIGKILL)
        sync = os.fsync
        os.fsync = lambda descriptor: (step(), sync(descriptor), step())
        job(output, step, resume)
        os.write(write, str(next(steps) - 1).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    told = os.read(read, 20)
    os.close(read)
    assert told or os.WTERMSIG(status) == signal.SIGKILL
    return int(told) if told else None

def content(path):
    return {file.name: file.read_bytes().replace(bytes(path), b"HERE") for file in path.iterdir()}

steps = attempt(folder / "whole/out")
whole = content(folder / "whole/out")
(place := folder / "killed").mkdir()
draw = random.Random(0)
moments = [1, steps] + [draw.randint(2, steps - 1) for _ in range(kills - 2)]
finished = shorter = 0
for number, moment in enumerate(moments):
    output = place / "out"
    assert attempt(output, moment) is None
    if output.exists():
        finished += 1
    else:
        left = [path.name for path in place.iterdir()]
        assert left in ([], [".out.unfinished"]), left
        second = attempt(output, draw.randint(1, steps), resume=True) if number % 3 == 0 else None
        needed = second or (None if output.exists() else attempt(output, resume=number % 4 != 3))
        shorter += needed is not None and needed < steps
    assert content(output) == whole, moment
    for file in output.iterdir():
        file.unlink()
    output.rmdir()
    assert not list(place.iterdir())
print(len(moments), finished, shorter)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("kill") / "base", MOE, shards=4)


@pytest.fixture(scope="module")
def adapter(base):
    return write_adapter(base.parent / "adapter", base, target_modules=ATTENTION, target_parameters=EXPERTS)


def killed(kind, source, folder, kills):
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, kind, str(source), str(folder), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert result.returncode == 0, result.stderr
    number, finished, shorter = map(int, result.stdout.split())
    assert number == kills
    assert finished <= kills // 4  # only deaths after the rename
    assert kind == "gguf" or shorter >= 1  # something was really resumed; a GGUF is one file


def test_a_killed_merge_never_looks_finished_and_resumes(adapter, tmp_path):
    killed("merge", adapter, tmp_path / "work", 8)


@pytest.mark.slow
def test_fifty_killed_merges(adapter, tmp_path):
    killed("merge", adapter, tmp_path / "work", 50)
