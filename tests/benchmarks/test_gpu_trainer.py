"""The comparison of trainers on a GPU: it runs on tiny shapes, and gives no number to a pair that differs."""

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from benchmarks.gpu import contestant, model_step, trainer, work
from benchmarks.gpu.contestant import Spec


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    def options(*more):
        folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["trainer", "--smoke", *folders, *more])
        return tmp_path / "out"

    return options


def trained(spec):
    """What a part finds, without training; selective checkpointing is made to differ."""
    wrong = 0.5 if spec.checkpointing == "selective" and spec.folder else 0.0
    if spec.experts == "nf4":
        return {"failed": "OutOfMemoryError: CUDA out of memory."}
    return {
        "step_s": 2.0, "tokens_per_s": 50.0, "first_step_s": 3.0, "load_s": 1.0, "peak_gib": None, "trainable": 10,
        "losses": [4.0, 3.0 + wrong, 2.0], "grad_norms": [1.0, 1.0, 1.0], "rows": [[1, 2, 3, 4]],
    }  # fmt: skip


def in_place(part, folder, seconds):
    """As `run_part`, in this process."""
    if part.spec is None:
        return {"said": "2 passed"}
    return {} if part.spec.who == "write" else trained(part.spec)


def read(folder):
    (found,), (page,) = (list(folder.glob(f"*-trainer-smoke.{kind}")) for kind in ("json", "md"))
    return json.loads(found.read_text()), page.read_text()


def test_work_of_a_token():
    config = model_step.qwen3_30b_a3b()
    assert work.flop_per_token(config, 4096, 16) == pytest.approx(18.1e9, rel=2e-3)
    assert work.peak_tflop_per_s("NVIDIA H200") == work.peak_tflop_per_s("NVIDIA H100 80GB HBM3") == 989
    assert work.peak_tflop_per_s("a card of next year") is None


def test_a_pair_that_differs_gets_no_number(smoke, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "run_part", in_place)
    output = smoke()
    assert trainer.main() == 1
    found, page = read(output)
    assert page in capsys.readouterr().out
    rows = {row["name"]: row for row in found["training"]}
    assert found["agreement"] == {"ours": "agrees", "ours, selective": "losses of step 2: 3.5, not 3"}
    assert rows["ours"]["step_s"] == rows["TRL + stock PEFT"]["step_s"] == 2.0
    assert rows["ours"]["of_stock"] == 1.0
    assert not {"step_s", "of_stock"} & rows["ours, selective"].keys()
    assert rows["ours, selective"]["failed"] == "no number: the two trainings differ"
    assert rows["ours, 48 layers, NF4"]["failed"] == "OutOfMemoryError: CUDA out of memory."
    assert rows["Unsloth"]["tokens_per_s"] == 50.0
    assert "| ours, 48 layers, NF4 | 3 | nf4 |" in page
    assert found["others"]["recipes"]["said"] == "2 passed"


def test_other_rows_and_other_gradients_are_other_training():
    one = trained(Spec("stock", 2))
    assert trainer.differences(one, one) == []
    assert trainer.differences({**one, "rows": [[2, 1, 3, 4]]}, one) == ["they read other rows, or in another order"]
    assert "grad_norms of step 3" in trainer.differences({**one, "grad_norms": [1.0, 1.0, 1.1]}, one)[0]
    assert trainer.differences({**one, "losses": [float("nan")] * 3}, one)
    assert trainer.differences({**one, "trainable": 11}, one) == ["11 parameters train, not 10"]


def test_the_least_important_parts_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "parts", lambda **_: [trainer.Part("first", 50), trainer.Part("last", 150)])
    monkeypatch.setattr(trainer.timing, "matmul_flop_per_s", lambda *_: 1e12)
    monkeypatch.setattr(trainer.run, "conditions", lambda _: {"date": "2026-01-01", "device": "a card"})
    monkeypatch.setattr(trainer.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["trainer", "--budget", "100", "--output", str(tmp_path)])
    found = trainer.measure(trainer.arguments(), tmp_path, lambda *_: {"said": "done"})
    assert list(found["others"]) == ["first"]
    assert "takes about 150 s" in found["skipped"]["last"]
    assert "- last: takes about 150 s" in (tmp_path / "2026-01-01-trainer.md").read_text()


def test_a_part_that_dies_is_a_row_with_its_reason(tmp_path):
    spec = Spec("nobody", 2, smoke=True)
    assert trainer.run_part(trainer.Part("one", 1, spec), tmp_path, 120)["failed"] == "KeyError: 'nobody'"
    assert "No module named" in trainer.run_part(trainer.Part("two", 1, command=("no_such",)), tmp_path, 60)["failed"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_ours_in_a_plain_loop_trains_like_the_trainer(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from transformers import trainer as theirs

    monkeypatch.setattr(theirs, "DEFAULT_CALLBACKS", [*theirs.DEFAULT_CALLBACKS])
    tiny = Spec("ours", 2, sequence_tokens=32, accumulation=2, steps=3, warmup=1, rank=4, smoke=True)
    tiny = replace(tiny, work=str(tmp_path))
    state = torch.random.get_rng_state()
    ours, bare = (contestant.run(replace(tiny, who=who)) for who in ("ours", "bare"))
    torch.random.set_rng_state(state)
    assert len(ours["losses"]) == len(bare["losses"]) == 3
    assert ours["trainable"] == bare["trainable"]
    assert sorted(ours["rows"]) == sorted(bare["rows"])
    assert ours["losses"][0] == pytest.approx(bare["losses"][0], rel=0.02)  # the trainer shuffles
    assert min(ours["step_s"], bare["first_step_s"]) > 0


@pytest.mark.slow
def test_smoke(smoke):
    output = smoke()
    assert trainer.main() == 0
    found, page = read(output)
    assert set(found["agreement"].values()) == {"agrees"}
    failed = [row["name"] for row in found["training"] if "failed" in row]
    assert set(failed) <= {"Unsloth"}
    assert "Expert layer, forward and backward" in page
