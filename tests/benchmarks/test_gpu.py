"""The GPU benchmark runs from start to end on a tiny shape, and prints no number when a result is wrong."""

import json
import sys

import pytest

pytest.importorskip("peft")

from benchmarks.gpu import check, run
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
    assert "ours, grouped, NF4" in {row["way"] for row in result["layers"]}
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
    assert "grouped, room 0, rank 1: wrong by 1" in printed.err
    assert list(smoke.iterdir()) == []


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

    def all_weights(self, *inputs):
        return self.stack.all_weights(*inputs) * 2
