"""Runs side by side, by the files in their folders alone."""

import json

import pytest

import finetune as ft
from finetune.__main__ import main
from finetune.errors import UserError
from finetune.training.run_lock import owned


def write_run(folder, started, losses, *, finished=True):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: {path: base}\n")
    facts = {"started": started, "base": {"name": "Qwen/Qwen3-0.6B"}}
    (folder / "facts.json").write_text(json.dumps(facts))
    rows = [{"step": 0, "eval_loss": 9.0}]
    for step, loss in enumerate(losses, 1):
        rows.append({"step": step, "loss": loss, "tokens_per_second": 1234.5, "peak_memory_gib": step / 10})
        rows.append({"step": step, "eval_loss": loss + 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text('{"steps": 2}')


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "late", "2026-02-02 10:00:00", [3.0, 2.0])
    write_run(tmp_path / "deep/early", "2026-02-01 10:00:00", [3.0, 1.0, 1.5], finished=False)
    (tmp_path / "none").mkdir()
    return tmp_path


def test_rows_by_date_or_another_column(folder):
    found = ft.runs(folder)
    assert repr(found) == "2 runs: deep/early, late"
    assert found.rows[0] == {
        "name": "deep/early", "model": "Qwen/Qwen3-0.6B", "state": "stopped", "date": "2026-02-01 10:00:00",
        "steps": 3, "loss": 1.5, "eval_before": 9.0, "eval_after": 2.5, "eval_best": 2.0,
        "tokens_per_second": 1234.5, "peak_memory_gib": 0.3,
    }  # fmt: skip
    assert [row["name"] for row in ft.runs(folder, sort="steps").rows] == ["late", "deep/early"]
    assert [row["name"] for row in ft.runs(folder / "late").rows] == ["late"]
    with pytest.raises(UserError, match="no column"):
        ft.runs(folder, sort="speed")
    with pytest.raises(UserError, match="not a folder"):
        ft.runs(folder / "missing")


def test_a_run_that_is_owned_goes_on(folder):
    with owned(folder / "late"):
        assert [row["state"] for row in ft.runs(folder).rows] == ["stopped", "running"]
    assert ft.runs(folder).rows[1]["state"] == "finished"


def test_the_command(folder, capsys):
    page = folder / "page.html"
    assert main(["runs", str(folder), "--json", "--html", str(page)]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    text = page.read_text()
    assert text.count("<svg ") == 2
    assert "deep/early" in text
    assert "http" not in text
    assert main(["runs", str(folder)]) == 0
    assert "finished" in capsys.readouterr().out
