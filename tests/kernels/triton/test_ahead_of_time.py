"""Compiled for GPUs that are not here: the configurations we ship keep everything in registers."""

import json
import os
import subprocess
import sys

import pytest

MAX_SHARED = {90: 227 * 1024, 80: 163 * 1024}
GROUPED = ("gate_up_rows", "project_rows", "down_back_rows")


SLOW = [pytest.param(arch, rank, marks=pytest.mark.slow) for arch, rank in ((80, 16), (90, 8), (90, 64))]


@pytest.mark.parametrize(("arch", "rank"), [(90, 16), *SLOW])
def test_no_kernel_spills(arch, rank, record_property):
    command = [sys.executable, "-m", "tests.kernels.triton.ahead_of_time", "--arch", str(arch), "--rank", str(rank)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    record_property(f"sm_{arch}", usage)
    assert len(usage) == 29
    assert {name: u["stack"] for name, u in usage.items() if u["stack"]} == {}
    for name, u in usage.items():
        assert u["registers"] <= 255
        assert u["shared"] <= MAX_SHARED[arch], name
        if name.startswith(GROUPED):
            assert u["wgmma" if arch == 90 and "DECODE" not in name else "mma"], f"{name} does not use tensor cores"
            assert u["cp_async"], f"{name} does not load ahead"
        if name.startswith("decode"):  # the CPU's bits: no fused multiply and add, and rounding to nearest
            assert (u["fused"], u["to_bf16"] > 0) == (0, True), name
