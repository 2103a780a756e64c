"""What a run sees of itself: the base's score, the best checkpoint, an early end, samples, trackers."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import finetune as ft
from finetune.config.load import load_recipe
from finetune.config.schema import TrainSection
from finetune.errors import RecipeError, TrainingError
from finetune.training.evaluation import Evaluations
from finetune.training.run_folder import RunFolder
from finetune.training.trackers import Trackers

PROMPTS = ["encode: c a t", "What is 12 + 7?"]
WILD = (
    "train.steps=20",
    "train.learning_rate=1.0",
    "train.schedule=constant",
    "train.warmup=0",
    "train.gradient_accumulation=1",
    "data.max_length=128",
    "adapter.expert_rank=2",
    "train.eval_every=2",
    "train.keep_best=loss",
    "train.patience=2",
    "train.keep=1",
    f"train.samples={{prompts: {json.dumps(PROMPTS)}, max_new_tokens: 8}}",
    "train.report_to=[tensorboard]",
)


def evaluations(*losses, **settings):
    section = TrainSection(keep_best=settings.pop("keep_best", "loss"), eval_every=1, **settings)
    rows = [{"step": step, "eval_loss": loss, "eval_exact_match": -loss} for step, loss in enumerate(losses)]
    return Evaluations(section, [{"step": 0, "loss": 9.0}, *rows])


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_the_best_is_the_first_of_the_best_trained_ones(metric):
    assert evaluations(0.1, 2.0, 1.0, 1.0, 3.0, keep_best=metric).best_step == 2
    assert evaluations(0.1, keep_best=metric).best_step is None
    assert evaluations(1.0, 2.0, keep_best=None).best_step is None


def test_patience_counts_evaluations_behind_the_best():
    assert not evaluations(9.0, 1.0, 2.0, patience=2).gave_up
    assert evaluations(9.0, 1.0, 2.0, 3.0, patience=2).gave_up
    assert not evaluations(9.0, 1.0, 2.0, 0.5, 3.0, patience=2).gave_up
    assert not evaluations(9.0, 1.0, 2.0, 3.0, 4.0).gave_up


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose rate is so high that its second evaluation is its best."""
    folder = tmp_path_factory.mktemp("best") / "run"
    return ft.train(load_recipe("recipes/quickstart.yaml", *WILD, f"output.dir={folder}"))


def test_a_run_that_gets_worse_ends_early_with_its_best_checkpoint(run):
    rows = RunFolder(run.path).read_metrics()
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best, last = run.summary["best_step"], run.summary["steps"]
    assert list(losses) == [0, *range(2, last + 1, 2)]
    assert best == min((step for step in losses if step), key=losses.get)
    assert last == best + 4 < 20
    assert run.summary["eval"]["loss"] == losses[best]
    assert run.summary["eval_before"]["loss"] == losses[0]
    assert [row["step"] for row in rows if "loss" in row][-1] == last
    assert any("before training" in warning for warning in run.summary["warnings"]) == (losses[best] >= losses[0])
    kept = sorted(path.name for path in RunFolder(run.path).checkpoints.glob("checkpoint-*"))
    assert kept == sorted([f"checkpoint-{best}", f"checkpoint-{last}"])
    saved = load_file(run.adapter / "adapter_model.safetensors")
    there = load_file(RunFolder(run.path).checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(saved[name].equal(there[name]) for name in saved | there)


def test_samples_are_rows_of_the_metrics_and_stand_in_the_report(run):
    rows = [row for row in RunFolder(run.path).read_metrics() if "samples" in row]
    assert [row["step"] for row in rows] == [0, *range(2, run.summary["steps"] + 1, 2)]
    assert all([sample["prompt"] for sample in row["samples"]] == PROMPTS for row in rows)
    assert rows[0]["samples"][1]["answer"] == ft.chat(
        "examples/tiny-qwen3-moe", PROMPTS[1], max_new_tokens=8, temperature=0
    )
    page = ft.report(run.path).read_text()
    assert "What is 12 + 7?" in page
    assert "<th>before</th>" in page


def test_the_tracker_gets_every_number_by_its_step(run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(run.path / "tensorboard")).Reload()
    rows = RunFolder(run.path).read_metrics()
    for tag, name in {"train/loss": "loss", "eval/loss": "eval_loss"}.items():
        written = {event.step: event.value for event in read.Scalars(tag)}
        assert written == pytest.approx({row["step"]: row[name] for row in rows if name in row})


def test_a_run_that_ended_early_is_over(run, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(run.path, folder)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    resumed = ft.resume(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert resumed.summary["best_step"] == run.summary["best_step"]
    weights = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (run.path, folder)]
    assert weights[0] == weights[1]


def test_what_cannot_be_is_refused(tmp_path):
    wrong = ("train.keep_best=loss", "train.eval_every=null", "train.report_to=[mlflow, trackio]")
    with pytest.raises(RecipeError) as refused:
        load_recipe("recipes/quickstart.yaml", *wrong, f"output.dir={tmp_path}")
    assert "evaluation is at the end only" in str(refused.value)
    assert "trackio, which is not installed" in str(refused.value)
    with pytest.raises(RecipeError, match=r"train\.keep_best is missing"):
        load_recipe("recipes/quickstart.yaml", "train.patience=3", f"output.dir={tmp_path}")


class Failing:
    """A tracker that works for one row."""

    rows = 0

    def on_train_begin(self, *_, **__):
        pass

    def on_log(self, *_, logs, **__):
        self.rows += 1
        raise OSError("gone")

    def on_train_end(self, *_, **__):
        raise OSError("gone")


def test_a_tracker_that_fails_costs_no_run(tmp_path, monkeypatch, caplog):
    import finetune.training.trackers as module

    for variable in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):  # so that none outlives this test
        monkeypatch.setenv(variable, "disabled")
    one = Failing()
    monkeypatch.setattr(module, "get_reporting_integration_callbacks", lambda names: [lambda: one])
    recipe = load_recipe("recipes/quickstart.yaml", f"output.dir={tmp_path}")
    trackers = Trackers(["wandb"], Path(tmp_path), recipe)
    trackers.on_train_begin(None, None, None)
    trackers({"step": 1, "loss": 1.0})
    trackers({"step": 2, "loss": 1.0})
    trackers.on_train_end(None, None, None)
    assert one.rows == 1
    assert "wandb gets no more metrics: gone" in caplog.text
    monkeypatch.setattr(module, "get_reporting_integration_callbacks", lambda names: [None])
    with pytest.raises(TrainingError, match="wandb: cannot be opened"):
        Trackers(["wandb"], Path(tmp_path), recipe)
