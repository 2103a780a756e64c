"""Whole runs with compiled decoder layers against the same runs without: losses, what is trained, graphs counted."""

import pytest
import torch
from torch._dynamo.utils import counters

from finetune.training import compiled
from finetune.training.run_folder import RunFolder
from tests.training.runs import EXPERTS, adapter_of, losses_of, resumed_from, rows_of, run_of, save_moe

PACKED = ("data.packing=true", "data.max_length=96", "train.gradient_accumulation=1")
CASES = {
    "chosen experts": (
        EXPERTS,
        "experts.select={top_fraction: 0.34}",
        "experts.mode=full",
        "experts.reselect={every: 2, margin: 0}",
        "router.train=lora",
        "train.gradient_checkpointing=full",
    ),
    "router losses": (EXPERTS, "router={train: full, aux_loss: 0.5, z_loss: 0.02, kl_to_base: 0.3}"),
    "nf4": (EXPERTS, "quantize.scheme=nf4", "train.gradient_checkpointing=selective", *PACKED),
}


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("base") / "moe")


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_is_the_plain_one(case, moe, tmp_path, graphs, caplog):
    plain = run_of(moe, tmp_path / "plain", *CASES[case])
    made = run_of(moe, tmp_path / "made", *CASES[case], "train.compile=on")
    assert losses_of(made) == pytest.approx(losses_of(plain), rel=1e-4)
    for name, tensor in adapter_of(made).items():
        torch.testing.assert_close(tensor, adapter_of(plain)[name], rtol=1e-3, atol=1e-4)
    assert graphs["stats"]["unique_graphs"] >= 1
    assert not graphs["graph_break"]
    assert "run uncompiled" not in caplog.text


def test_twenty_packed_blocks_of_the_trainers_own_take_one_graph(moe, tmp_path, graphs):
    run = run_of(moe, tmp_path / "run", *PACKED, "train.steps=20", "train.compile=on", EXPERTS)
    assert len(rows_of(run)) == 20
    assert graphs["stats"]["unique_graphs"] == 1
    assert not graphs["graph_break"]


def test_a_compiled_run_is_evaluated_and_resumed(moe, tmp_path):
    more = ("train.eval_every=2", "train.save_every=2", "train.compile=on", EXPERTS)
    more += ("data.eval=examples/data/secret-code-heldout.jsonl",)
    run = run_of(moe, tmp_path / "run", *PACKED, *more)
    losses, adapter = losses_of(run), adapter_of(run)
    evals = [row["eval_loss"] for row in RunFolder(run.path).read_metrics() if "eval_loss" in row]
    assert len(evals) == 3
    again = resumed_from(run, 2, moe, *PACKED, *more)
    assert losses_of(again) == losses
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in adapter_of(again).items())
