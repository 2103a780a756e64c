"""Two processes with compiled layers make the run of one without: router losses, whole experts, experts chosen anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.pipeline import Run
from finetune.training import compiled
from finetune.training.run_folder import RunFolder
from tests.training.runs import EXPERTS, resumed_from, rows_of, run_of, save_moe

ROOT = Path(__file__).resolve().parent.parent.parent
OVERRIDES = (
    EXPERTS,
    "experts.select={top_fraction: 0.34}",
    "experts.mode=full",
    "experts.reselect={every: 2, margin: 0}",
    "router={train: full, aux_loss: 0.5, z_loss: 0.02, kl_to_base: 0.3}",
)
NAMES = ("loss", "grad_norm", "router_aux_loss", "router_z_loss", "router_kl_to_base")


def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    model, rows = save_moe(tmp_path / "moe"), tmp_path / "rows.jsonl"
    rows.write_text("".join(Path("examples/data/secret-code.jsonl").read_text().splitlines(keepends=True)[:15]))
    overrides = (*OVERRIDES, f"data.train={rows}", "train.steps=null", "train.epochs=1")  # 15 do not divide by 2
    alone = run_of(model, tmp_path / "one", *overrides)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["tests/training/two_processes.py", str(model), str(tmp_path / "two"), *overrides]
    command += ["train.gradient_accumulation=2", "train.compile=on", "train.save_every=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "run uncompiled" not in done.stderr
    both = RunFolder(tmp_path / "two").read_metrics()
    losses = [[row[name] for name in NAMES] for row in both if "loss" in row]
    for mine, theirs in zip(losses, rows_of(alone), strict=True):
        assert mine == pytest.approx([theirs[name] for name in NAMES], rel=1e-3, abs=1e-5)
    one_goes_on = resumed_from(Run(tmp_path / "two", {}), 2, model, *overrides, "train.compile=on")
    for mine, theirs in zip(rows_of(one_goes_on), rows_of(alone), strict=True):
        assert [mine[name] for name in NAMES] == pytest.approx([theirs[name] for name in NAMES], rel=1e-3, abs=1e-5)
    swaps = [json.dumps(row) for row in both if "experts_swapped" in row]
    assert swaps == [json.dumps(row) for row in RunFolder(alone.path).read_metrics() if "experts_swapped" in row]
