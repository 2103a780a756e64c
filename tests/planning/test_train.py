"""A run that is beyond the machine is refused before it begins, and one that is not says what it takes."""

from __future__ import annotations

import pytest

from finetune.__main__ import main
from finetune.planning import device

RECIPE = "recipes/quickstart.yaml"


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(device, "machine_memory_gib", lambda: 0.1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_train_refuses_the_hopeless_before_it_writes(small_machine, tmp_path, capsys):
    assert main(["train", RECIPE, f"output.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "would need about" in error
    assert "train.plan=off" in error
    assert not (tmp_path / "run").exists()


def test_check_shows_the_plan_beside_the_recipe(small_machine, monkeypatch, capsys):
    monkeypatch.setattr(device, "_nvidia_smi", list)
    assert main(["check", RECIPE, "--plan"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main(["check", RECIPE, "--plan", "--json"]) == 0
    assert '"verdict": "does not fit"' in capsys.readouterr().out
