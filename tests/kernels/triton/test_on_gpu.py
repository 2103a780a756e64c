"""What only a GPU can show of the tiles: every candidate is right there, and measuring chooses among them."""

import pytest
import torch

from benchmarks.gpu import check
from benchmarks.gpu.layers import Case, Shape, ours
from finetune.kernels import reference
from finetune.kernels.layer import ExpertLayer, Factors
from finetune.kernels.tiles import Load, tune
from finetune.kernels.triton import remembered, shapes, tuning
from finetune.kernels.triton.shapes import Shapes, Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, TOP_K = 700, 2


def workload(**sizes):
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = {"experts": 6, "hidden": 512, "intermediate": 256, "rank": 16} | sizes
    return Workload(device, torch.bfloat16, **sizes)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(shapes, "TUNED", {})


ODD = {
    "whole": {},
    "ends in every direction": {"hidden": 520, "intermediate": 264},
    "H == 2I, rank 5": {"hidden": 512, "intermediate": 256, "rank": 5},
    "no factors": {"rank": 0},
    "rank 64": {"rank": 64},
    "some experts without rows": {"experts": 100},
    "strides that TMA cannot read": {"hidden": 132, "intermediate": 68},
}


@pytest.mark.parametrize("sizes", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("tokens", [TOKENS, 1])
def test_every_candidate_of_every_product(sizes, tokens, monkeypatch):
    """Against the standard tiles, which `tests.kernels.test_on_gpu` compares with the reference."""
    major = torch.cuda.get_device_capability()[0]
    at = workload(**sizes)
    options = shapes.candidates(64 * at.experts, at, major)
    monkeypatch.setattr(shapes, "candidates", lambda *_: options)
    measured = tuning.measure(at, tokens, TOP_K, lambda run: 1.0)
    assert len(measured) == sum(len(found) for option in options for found in option.values()) >= 8
    assert [(m.product, str(m.shape), m.fault) for m in measured if m.fault] == []


def test_every_tile_against_the_reference():
    """A whole layer, all gradients; backward runs in a thread of autograd's own."""
    shape = Shape(experts=6, hidden=512, intermediate=256, top_k=2)
    case, major = Case(shape, 300, torch.device("cuda")), torch.cuda.get_device_capability()[0]
    layer = case.layer(case.banks)
    want = check.gradients(case, lambda: reference.expert_mlp(case.x, case.index, case.weights, layer))
    for option in shapes.candidates(64 * 6, workload(), major):
        for i in range(max(map(len, option.values()))):
            tiles = Shapes(**{product: found[i % len(found)] for product, found in option.items()})
            with shapes.forced(tiles):
                got = check.gradients(case, ours(case, "triton", padding=False))
            assert check.differences(shape, got, want) == [], tiles


def test_measuring_chooses_and_remembers(tmp_path):
    path, at = tmp_path / "tiles.json", workload(experts=16)
    found = tuning.prepare(at, 1024, 4, path=path)
    assert shapes.shapes_for(4096, at) == found
    assert remembered.read(path) == {tuning.entry_name(at, 4096): found}
    shapes.TUNED.clear()
    assert tuning.prepare(at, 1024, 4, timer=None, path=path) == found


def test_a_layer_is_tuned_checked_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = workload()
    gate_up, down = (
        torch.randn(6, *shape, device=here.device, dtype=here.dtype) * 0.05 for shape in ((512, 512), (512, 256))
    )
    slots = torch.arange(6, device=here.device)
    factors = [
        Factors(torch.randn(6, 16, wide, device=here.device), torch.randn(6, 512, 16, device=here.device), 1.0, slots)
        for wide in (512, 256)
    ]
    load = Load(TOKENS, TOP_K)
    tune(ExpertLayer(gate_up, down, *factors), load)
    chosen = shapes.shapes_for(TOKENS * TOP_K, here)
    assert remembered.read(remembered.default_path()) == {tuning.entry_name(here, TOKENS * TOP_K): chosen}
