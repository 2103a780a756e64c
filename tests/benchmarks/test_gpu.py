"""The GPU benchmark runs from start to end on a tiny shape, and prints no number when a result is wrong."""

import json
import sys

import pytest

pytest.importorskip("peft")

from benchmarks.gpu import check, run


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
    assert result["model"][0]["tokens_per_s"] > 0
    assert "| ours, grouped in blocks |" in page.read_text()


def test_no_number_on_red(smoke, capsys, monkeypatch):
    monkeypatch.setattr(check.self_check, "fault", lambda case: "wrong by 1")
    assert run.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "not measured" in printed.err
    assert "grouped, room 0, rank 1: wrong by 1" in printed.err
    assert list(smoke.iterdir()) == []
