"""Tiles that were chosen for a layer are checked with the reference before a forward takes them."""

import logging
from dataclasses import replace

import pytest
import torch

from finetune.kernels import self_check, tiles
from finetune.kernels.layer import ExpertLayer, Factors
from finetune.kernels.tiles import Load
from finetune.kernels.triton import remembered, shapes, tuning
from finetune.kernels.triton.shapes import Shape, Shapes, Workload

CHOSEN = Shapes.same(Shape(16, 32, 16, 4, 2))
LOAD = Load(tokens=24, top_k=2)
WORKLOAD = Workload(torch.device("cpu"), torch.float32, experts=4, hidden=16, intermediate=8, rank=4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shapes, "TUNED", {})
    monkeypatch.setattr(tiles, "CHECKED_TOKENS", 40)
    monkeypatch.setattr(self_check, "fault", self_check.once_apart(self_check.fault.__wrapped__))
    path = remembered.default_path()
    remembered.write(path, tuning.entry_name(WORKLOAD, 48), CHOSEN)
    options = [{name: [CHOSEN[0]] for name in Shapes._fields}]
    monkeypatch.setattr(shapes, "candidates", lambda *_: options)


def a_layer():
    gate_up, down = torch.zeros(4, 16, 16), torch.zeros(4, 16, 8)
    slots = torch.tensor([0, -1, 1, -1])
    factors = [Factors(torch.zeros(2, 4, wide), torch.zeros(2, 16, 4), 1.0, slots) for wide in (16, 8)]
    return ExpertLayer(gate_up, down, *factors)


def seen(monkeypatch):
    """The cases that were compared, with the tiles that products then took."""
    cases, compare = [], self_check._compare
    monkeypatch.setattr(self_check, "_compare", lambda case: cases.append(case) or compare(case))
    return cases


def test_right_tiles_are_compared_once_and_taken(monkeypatch):
    cases = seen(monkeypatch)
    tiles.choose_tiles(a_layer(), LOAD)
    tiles.choose_tiles(a_layer(), LOAD)
    assert [(case.tiles, case.tokens, case.gate_up_rank, case.down_rank) for case in cases] == [(CHOSEN, 40, 4, 4)]
    assert shapes.shapes_for(48, WORKLOAD) == CHOSEN


def test_wrong_tiles_are_dropped_with_a_warning_and_for_good(monkeypatch, caplog):
    monkeypatch.setattr(self_check, "_compare", lambda case: f"output is wrong by 1 with {case.tiles.gate_up.columns}")
    with caplog.at_level(logging.WARNING):
        tiles.choose_tiles(a_layer(), LOAD)
    assert "output is wrong by 1 with 32; the standard ones stay" in caplog.text
    standard = shapes.standard(WORKLOAD, 48)
    assert shapes.shapes_for(48, WORKLOAD) == standard != CHOSEN
    assert remembered.read(remembered.default_path())[tuning.entry_name(WORKLOAD, 48)] == standard


def test_a_check_runs_with_the_tiles_it_was_asked_for(monkeypatch):
    taken, with_gradients = [], self_check.device_op.with_gradients

    def noting(*args):
        taken.append(shapes.shapes_for(320, WORKLOAD))
        return with_gradients(*args)

    monkeypatch.setattr(self_check.device_op, "with_gradients", noting)
    case = self_check.Case("triton", WORKLOAD.device, torch.float32, 16, 8, 4, 4, 0, tokens=40, tiles=CHOSEN)
    assert self_check.fault(case) is None
    assert self_check.fault(replace(case, tiles=None)) is None
    assert taken[0] == CHOSEN != taken[1]


def test_nothing_is_chosen_without_a_gpu(monkeypatch):
    monkeypatch.setattr(tiles, "choose_tiles", lambda *_: pytest.fail("tiles were chosen"))
    tiles.tune(a_layer(), LOAD, "triton")
