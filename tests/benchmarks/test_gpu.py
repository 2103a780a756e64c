"""The GPU benchmark runs from start to end on a tiny shape, and prints no number when a result is wrong."""

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from benchmarks.gpu import check, layers, run
from finetune.kernels.layer import new_handle


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--smoke", "--output", str(tmp_path)])
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_smoke(smoke, capsys):
    assert run.main() == 0
    (found,), (page,) = (list(smoke.glob(f"*-gpu-smoke.{kind}")) for kind in ("json", "md"))
    result = json.loads(found.read_text())
    assert page.read_text() in capsys.readouterr().out
    assert {row["tokens"] for row in result["layers"]} == {16, 64}
    assert "frozen (transformers)" in {row["way"] for row in result["layers"]}
    assert all(row["step_ms"] > 0 for row in result["layers"])
    assert "ours, grouped in blocks, NF4" in {row["way"] for row in result["layers"]}
    assert [row["experts"] for row in result["model"]] == ["16 bit", "nf4", "fp8"]
    assert all(row["tokens_per_s"] > 0 for row in result["model"])
    assert len({row["parameters"] for row in result["model"]}) == 1
    assert {row["scheme"] for row in result["decode"]} == {"nf4", "fp8"}
    assert "| ours, grouped in blocks |" in page.read_text()


def test_no_number_on_red(smoke, capsys, monkeypatch):
    monkeypatch.setattr(check.self_check, "fault", lambda case: "wrong by 1")
    assert run.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "not measured" in printed.err
    assert "grouped, padding 0, rank 1: wrong by 1" in printed.err
    assert list(smoke.iterdir()) == []


def test_what_was_measured_is_kept_when_the_next_table_fails(smoke, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(run, "model_rows", fail)
    with pytest.raises(RuntimeError, match="the card is gone"):
        run.main()
    result = json.loads(next(smoke.glob("*.json")).read_text())
    assert {row["tokens"] for row in result["layers"]} == {16, 64}
    assert result["decode"]


def test_a_model_that_does_not_fit_is_a_row(monkeypatch):
    def measure(*_, experts, **__):
        if experts == "16 bit":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return {"step_s": 1.0}

    monkeypatch.setattr(run.model_step, "measure", measure)
    rows = run.model_rows(torch.device("cpu"), ["grouped"], smoke=True)
    assert [row.get("failed") for row in rows] == ["OutOfMemoryError: CUDA out of memory.", None, None]
    page = run.table(rows)
    assert "| experts | backend | sequences | sequence_tokens | failed | step_s |" in page
    assert "| nf4 | torch | 1 | 64 |  | 1 |" in page


def test_other_tiles_are_compared_with_those_we_ship(monkeypatch):
    shapes = pytest.importorskip("finetune.kernels.triton.shapes")
    pytest.importorskip("tests.kernels.triton.interpreted")
    monkeypatch.setattr(run, "TILES", {"small": (32, 32, 32, 4, 2), "not a power of two": (12, 32, 32, 4, 2)})
    monkeypatch.setattr(run.timing, "alternating", lambda runs, *_: dict.fromkeys(runs, 1e-3))
    shape = replace(layers.tiny(layers.Shape()), experts=2)
    workload = run.tile_workload(shape, torch.device("cpu"))
    shipped = shapes.shapes_for(140, workload)

    def rows():
        return run.tile_rows(shape, 70, torch.device("cpu"))

    small, other = rows()
    assert small == {"tokens": 70, "tiles": "small", "shipped": False, "step_ms": 1.0}
    assert other["failed"]
    monkeypatch.setattr(run.check, "differences", lambda *_: ["gradient of x is wrong by 1"])
    assert rows()[0]["failed"] == "RuntimeError: gradient of x is wrong by 1"
    assert shipped == shapes.shapes_for(140, workload)


def test_products_are_timed_alone(monkeypatch):
    tuning = pytest.importorskip("finetune.kernels.triton.tuning")
    tile = tuning.shapes.BUSY
    found = [tuning.Measured("gate_up", tile, 1e-3), tuning.Measured("down", tile, None, "too large")]
    monkeypatch.setattr(tuning, "measure", lambda *_: found)
    shape = replace(layers.Shape(), dtype=torch.float16)
    timed, failed = run.product_rows(shape, 2048, torch.device("cpu"))
    assert timed["tflop_per_s"] == pytest.approx(4 * 2048 * 8 * 2048 * 768 / 1e9)
    assert (timed["ms"], timed["shipped"], failed["failed"]) == (1.0, True, "too large")


def test_every_size_of_tile_is_checked():
    shapes = pytest.importorskip("finetune.kernels.triton.shapes")
    shape = layers.Shape()
    sizes = [shapes.shape_for(tokens * shape.top_k, shape.experts) for tokens in check.TOKENS]
    assert {shapes.DECODE, shapes.SPARSE, shapes.BUSY} == set(sizes)


def test_wrong_packed_experts_are_found(smoke, capsys, monkeypatch):
    right = check.Case.packed

    def wrong(case, scheme):
        stacks = right(case, scheme)
        return [*stacks[:1], Doubled(stacks[1])]

    monkeypatch.setattr(check.Case, "packed", wrong)
    assert run.main() == 1
    printed = capsys.readouterr().err
    assert "nf4: expert 0 of (8, 32, 16) is decoded to other bits than on the CPU" in printed


class Doubled:
    """A stack that is decoded wrongly as a whole."""

    def __init__(self, stack):
        self.stack, self.handle = stack, new_handle(self)

    def __getattr__(self, name):
        return getattr(self.stack, name)

    def decode_(self, out, end_E=None):
        self.stack.decode_(out, end_E)
        out.mul_(2)
