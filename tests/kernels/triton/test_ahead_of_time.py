"""Compiled for GPUs that are not here: the configurations we ship keep everything in registers."""

import json
import os
import subprocess
import sys

import pytest

MAX_SHARED = {90: 227 * 1024, 80: 99 * 1024}
"""What a program may have; on sm_86 and sm_89, which run what is compiled for sm_80, it is less than there."""

NUM_PRODUCTS = {
    (90, 16, "bfloat16", True): 16, (90, 16, "bfloat16", False): 31, (90, 8, "bfloat16", False): 31,
    (90, 64, "bfloat16", False): 26, (90, 16, "float32", False): 12,
    (90, 64, "float32", False): 12, (80, 64, "float32", False): 12, (80, 64, "bfloat16", False): 12,
    (80, 16, "bfloat16", False): 14, (80, 16, "float32", False): 12,
}  # fmt: skip
"""Grouped products times the tiles that each could take."""

GROUPED = ("gate_up:", "down:", "down_back:", "gate_up_back:")

SLOW = [case[:3] for case in NUM_PRODUCTS if not case[3]]


def compiled(*options):
    command = [sys.executable, "-m", "tests.kernels.triton.ahead_of_time", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_float16_is_decoded_in_float32_and_rounded_once():
    """Whence the CPU's bits: a product in float32 and one rounding to nearest, no product in float16."""
    usage = compiled("--dtype", "float16", "--only", "decode")
    assert len(usage) == 4
    for name, u in usage.items():
        assert (u["fused"], u["products_fp16"], u["to_fp16"] > 0) == (0, 0, True), name


@pytest.mark.parametrize(
    ("arch", "rank", "dtype", "more"),
    [
        (90, 16, "bfloat16", ["--quick"]),
        *(pytest.param(*case, [], marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_no_kernel_spills(arch, rank, dtype, more, record_property):
    usage = compiled("--arch", str(arch), "--rank", str(rank), "--dtype", dtype, *more)
    record_property(f"sm_{arch}", usage)
    products = {name: u for name, u in usage.items() if name.startswith(GROUPED)}
    assert len(usage) - len(products) == 18
    assert len(products) == NUM_PRODUCTS[arch, rank, dtype, bool(more)]
    assert {name: u["stack"] for name, u in usage.items() if u["stack"]} == {}
    for name, u in usage.items():
        assert u["registers"] <= 255
        assert u["shared"] <= MAX_SHARED[arch], name
        if name.startswith("decode"):  # the CPU's bits: no fused multiply and add, and rounding to nearest
            assert (u["fused"], u["to_bf16"] > 0, u["wide_stores"]) == (0, True, 4), name
    if dtype == "bfloat16":
        for name, u in products.items():
            assert u["wgmma" if arch == 90 and " 16x" not in name else "mma"], f"{name} does not use tensor cores"
            assert u["tma" if "walking" in name else "cp_async"], f"{name} does not load ahead"
