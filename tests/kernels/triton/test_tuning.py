"""Choosing tiles: what is asked without a measurement, what is measured, and what is remembered."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from finetune.kernels import sorted_rows
from finetune.kernels.device_path import Inputs
from finetune.kernels.triton import remembered, shapes, tiles, tuning
from finetune.kernels.triton.shapes import BUSY, DECODE, SPARSE, WIDE, Shape, Shapes, Workload

CPU = torch.device("cpu")
QWEN3 = Workload(CPU, torch.bfloat16, experts=128, hidden=2048, intermediate=768, rank=16)
SMALL = Workload(CPU, torch.float16, experts=2, hidden=16, intermediate=8, rank=4)
TOKENS, TOP_K = 40, 2
LITTLE = Shape(16, 16, 16, 4, 2)
OTHER = replace(LITTLE, columns=32)
WALK = replace(LITTLE, programs=1)
TOO_LARGE = Shape(12, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(shapes, "TUNED", {})


class FakeTrial:
    """Products that cost nothing; one with tiles that cannot be fails."""

    def __init__(self, *_):
        pass

    def run(self, product, shape):
        def run():
            if shape == TOO_LARGE:
                raise ValueError("too large")
            return (torch.ones(3),)

        return run


@pytest.fixture
def fake(monkeypatch, few_candidates):
    monkeypatch.setattr(tuning, "_Trial", FakeTrial)


@pytest.fixture
def few_candidates(monkeypatch):
    options = [{name: [LITTLE, OTHER, WALK, TOO_LARGE] for name in Shapes._fields}]
    monkeypatch.setattr(shapes, "candidates", lambda *_: options)
    monkeypatch.setattr(shapes, "standard", lambda *_: Shapes.same(LITTLE))


class Clock:
    """Takes as long for every run as the list says, from the front."""

    def __init__(self, *seconds):
        self.seconds, self.runs = list(seconds), 0

    def __call__(self, run):
        run()
        self.runs += 1
        return self.seconds[(self.runs - 1) % len(self.seconds)]


def prepare(path, clock, workload=SMALL):
    return tuning.prepare(workload, TOKENS, TOP_K, timer=clock, path=path)


@pytest.mark.parametrize(
    ("major", "dtype", "load", "want"),
    [
        (9, torch.bfloat16, 512, WIDE),
        (9, torch.float16, 2048, WIDE),
        (9, torch.bfloat16, 511, BUSY),
        (9, torch.float32, 2048, replace(BUSY, depth=32)),
        (8, torch.bfloat16, 2048, BUSY),
        (0, torch.bfloat16, 2048, BUSY),
        (9, torch.bfloat16, 64, SPARSE),
        (9, torch.bfloat16, 8, DECODE),
    ],
)
def test_without_a_measurement(monkeypatch, major, dtype, load, want):
    monkeypatch.setattr(shapes, "capability", lambda device: (major, 0))
    assert shapes.shapes_for(load * 128, QWEN3._replace(dtype=dtype)) == Shapes.same(want)


@pytest.mark.parametrize("load", [16, 64, 128, 512, 2048])
@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("rank", [16, 64])
def test_candidates_share_their_rows_and_hold_the_standard(load, major, rank, monkeypatch):
    monkeypatch.setattr(shapes, "capability", lambda device: (major, 0))
    options = shapes.candidates(load * 128, QWEN3._replace(rank=rank), major)
    assert [len({s.rows for found in option.values() for s in found}) for option in options] == [1] * len(options)
    assert [next(iter(o.values()))[0].rows for o in options] == (
        [] if load < 32 else [128, 64] if load < 256 else [128]
    )
    standard = shapes.standard(QWEN3, load * 128)
    for option in options:
        assert set(option) == set(Shapes._fields)
        assert all(major == 9 or not s.programs for found in option.values() for s in found)
        assert all(s.pointed in found for found in option.values() for s in found)  # what odd strides fall back to
    assert not options or any(standard.down in option["down"] for option in options)
    assert shapes.candidates(load * 128, QWEN3._replace(dtype=torch.float32), major) == []


def test_the_fastest_of_each_product_is_taken_and_remembered(fake, tmp_path):
    clock = Clock(1.0, 0.5, 0.7)
    found = prepare(tmp_path / "tiles.json", clock)
    assert found == Shapes.same(OTHER)
    assert clock.runs == 3 * 4  # tiles that are too large are left out
    assert shapes.shapes_for(TOKENS * TOP_K, SMALL) == found
    assert shapes.shapes_for(TOKENS * TOP_K + 30, SMALL) == found  # the same power of two
    assert shapes.shapes_for(TOKENS * TOP_K * 2, SMALL) == Shapes.same(LITTLE)
    assert prepare(tmp_path / "tiles.json", None) == found
    shapes.TUNED.clear()
    assert prepare(tmp_path / "tiles.json", None) == found
    shapes.TUNED.clear()
    assert prepare(tmp_path / "tiles.json", None, SMALL._replace(rank=8)) == Shapes.same(LITTLE)


def test_noise_changes_nothing(fake, tmp_path):
    assert prepare(tmp_path / "tiles.json", Clock(1.0, 0.99, 0.985)) == Shapes.same(LITTLE)


def test_a_wrong_candidate_is_not_taken(few_candidates, tmp_path, monkeypatch, caplog):
    right = tuning.project

    def project(inputs, weight, low_rank, tiling):
        y = right(inputs, weight, low_rank, tiling)
        return y * 2 if tiling.shapes.down == OTHER else y

    monkeypatch.setattr(tuning, "project", project)
    found = prepare(tmp_path / "tiles.json", Clock(1.0))
    assert "down with tiles of 16x32x16, 4 warps, 2 stages is wrong by 1: not taken" in caplog.text
    assert found.down == LITTLE


@pytest.mark.parametrize("wrong", [torch.nan, 2.0])
def test_any_wrong_output_counts(wrong):
    want = torch.ones(2), torch.ones(2)
    measured = tuning._one("down", LITTLE, lambda: (want[0], want[1] * wrong), want, lambda run: 1.0)
    assert (measured.seconds, measured.fault) == (None, f"wrong by 0, {abs(wrong - 1):.2g}")


@pytest.mark.parametrize("rank", [0, 4])
def test_every_candidate_computes_the_same(few_candidates, rank):
    measured = tuning.measure(SMALL._replace(rank=rank), TOKENS, TOP_K, Clock(1.0))
    assert {m.shape for m in measured if m.fault} == {TOO_LARGE}
    assert len(measured) == 16


def test_the_rows_of_all_products_agree():
    low, high = replace(LITTLE, rows=16), replace(LITTLE, rows=32)
    options = [{name: [shape] for name in Shapes._fields} for shape in (low, high)]
    seconds = {"gate_up": (1.0, 9.0), "down": (1.0, 0.1), "down_back": (1.0, 0.1), "gate_up_back": (1.0, 0.1)}
    measured = [
        tuning.Measured(p, s, t) for p, times in seconds.items() for s, t in zip((low, high), times, strict=True)
    ]
    assert tuning.best(measured, options, Shapes.same(high)) == Shapes.same(low)
    unusable = [m._replace(seconds=None) if (m.product, m.shape) == ("down", low) else m for m in measured]
    assert tuning.best(unusable, options, Shapes.same(high)) == Shapes.same(high)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 2, "tiles": {}}', '{"format": 1, "tiles": {"a": {"gate_up": [1]}}}', "\xff"],
)
def test_a_damaged_file_is_measured_again(fake, tmp_path, content, caplog):
    path = tmp_path / "tiles.json"
    path.write_text(content, encoding="latin-1")
    assert prepare(path, Clock(1.0, 0.5, 0.7)) == Shapes.same(OTHER)
    assert "not the tiles that were remembered" in caplog.text
    assert list(remembered.read(path).values()) == [Shapes.same(OTHER)]
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("numbers", [[128, 64, 64, 8, 3, 0, 0], [16, 16, 16, 4, 2, 5, 0]])
def test_tiles_that_are_no_candidates_are_measured_again(fake, tmp_path, numbers):
    path, name = tmp_path / "tiles.json", tuning.entry_name(SMALL, TOKENS * TOP_K)
    entry = dict.fromkeys(Shapes._fields, numbers)
    path.write_text(json.dumps({"format": 1, "tiles": {name: entry}}))
    assert prepare(path, Clock(1.0, 0.5, 0.7)) == Shapes.same(OTHER)


def test_a_folder_that_cannot_be_written_is_fine(fake, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert prepare(tmp_path / "file" / "tiles.json", Clock(1.0, 0.5, 0.7)) == Shapes.same(OTHER)
    assert "tiles are not remembered" in caplog.text


def test_nothing_is_timed_without_a_gpu(tmp_path):
    assert tuning.prepare(QWEN3, 8192, 8, path=tmp_path / "tiles.json") == Shapes.same(BUSY)
    assert not list(tmp_path.iterdir())


def test_want_of_memory_leaves_the_standard(few_candidates, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tuning, "_Trial", full)
    assert prepare(tmp_path / "tiles.json", Clock(1.0)) == Shapes.same(LITTLE)
    assert "no memory to measure tiles" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered.default_path() == tmp_path / "finetune" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered.default_path() == tmp_path / ".cache" / "finetune" / "tiles.json"


def test_which_operands_are_read_in_boxes():
    x, bank = Inputs(torch.empty(8, 16, dtype=torch.float16)), torch.empty(2, 24, 16, dtype=torch.float16)
    odd = torch.empty(2, 24, 20, dtype=torch.float16)
    empty, gathered = Inputs(x.values[:0]), Inputs(torch.empty(8, 17, dtype=torch.float16)[:, :16], torch.arange(8))

    def walks(inputs, weight, mirrored=False):
        return tiles.readable_in_boxes(WALK, inputs, weight, mirrored=mirrored).programs > 0

    assert walks(x, bank)
    assert walks(x, bank.mT, mirrored=True)
    assert walks(gathered, bank)
    assert walks(x, torch.empty(2, 24, 32, dtype=torch.float16)[:, :, :16])  # rows that lie apart, in blocks
    assert not walks(x, bank.mT)
    assert not walks(x, odd[:, :, :16])
    assert not walks(x, torch.empty(2, 24, 24, dtype=torch.float16)[:, :, 4:20])
    assert not walks(gathered._replace(source=None), bank)
    assert not walks(empty, bank)


def test_forced_tiles_are_taken_back():
    with shapes.forced(Shapes.same(OTHER)):
        assert shapes.shapes_for(80, SMALL) == Shapes.same(OTHER)
    assert shapes.shapes_for(80, SMALL) == Shapes.same(SPARSE)
    rows = sorted_rows.sort_rows(torch.zeros(80, 1, dtype=torch.long), 2)
    assert tiles.Tiling.of(rows, SMALL).shapes == Shapes.same(SPARSE)
