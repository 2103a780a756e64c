"""Short real runs: what the recipe says is what happens."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from finetune.config.load import parse_recipe
from finetune.errors import AdapterError, TrainingError, UserError
from finetune.pipeline import train
from finetune.training.run_folder import RunFolder
from finetune.training.trainer import StepTrainer
from tests.tiny import save_as_hub, tiny_dense, tiny_moe

BASE = Path("examples/tiny-qwen3-moe")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random MoE and a random dense Qwen3 with the embedded model's tokenizer."""
    folders = {}
    for name, build in (("moe", tiny_moe), ("dense", tiny_dense)):
        folder = save_as_hub(build(vocab_size=704, eos_token_id=2), tmp_path_factory.mktemp(name))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(BASE / file, folder)
        folders[name] = folder
    return folders


def recipe(model, output, *overrides, adapter="{attention: [q_proj], experts: [down_proj], rank: 4, alpha: 8}"):
    text = f"""
model: {{path: {model}, dtype: float32}}
adapter: {adapter}
data:
  train: examples/data/secret-code.jsonl
  eval: examples/data/secret-code-heldout.jsonl
  max_length: 256
train: {{steps: 4, gradient_accumulation: 2, learning_rate: 1e-2, precision: fp32, schedule: constant, warmup: 0}}
output: {{dir: {output}}}
"""
    return parse_recipe(text, "test.yaml", *overrides)


def losses(run):
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def adapter_tensors(run):
    from safetensors.torch import load_file

    return load_file(run.adapter / "adapter_model.safetensors")


def test_dense_models_train_attention_and_mlp(models, tmp_path):
    adapter = "{attention: [q_proj, v_proj], mlp: [gate_proj, up_proj, down_proj], rank: 4, alpha: 8}"
    run = train(recipe(models["dense"], tmp_path / "run", adapter=adapter), console=QUIET)
    assert losses(run)[-1] < losses(run)[0]
    trained = {name.split(".")[-3] for name, value in adapter_tensors(run).items() if "lora_B" in name and value.any()}
    assert trained == {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


def tensors_in(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_8_bit_adamw_holds_8_bit_state_and_is_close_to_adamw(models, tmp_path):
    adapter = "{attention: [q_proj], experts: [down_proj], rank: 32, alpha: 32}"  # bitsandbytes: from 4,096 elements on
    runs = [
        train(recipe(models["moe"], tmp_path / name, f"train.optimizer={name}", adapter=adapter), console=QUIET)
        for name in ("adamw", "adamw_8bit")
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-2)
    states = [torch.load(run.path / "checkpoints/checkpoint-4/optimizer.pt", weights_only=True) for run in runs]
    dtypes = [{tensor.dtype for tensor in tensors_in(state["state"]) if tensor.dim()} for state in states]
    assert dtypes[0] == {torch.float32}
    assert torch.uint8 in dtypes[1]


def test_accumulation_sums_to_the_larger_batch(models, tmp_path):
    rows = "data.packing=false"
    small = train(recipe(models["moe"], tmp_path / "small", rows), console=QUIET)
    one_batch = ("train.batch_size=2", "train.gradient_accumulation=1")
    large = train(recipe(models["moe"], tmp_path / "large", rows, *one_batch), console=QUIET)
    assert losses(small) == pytest.approx(losses(large), rel=1e-4)


def test_packed_blocks_train_as_with_a_mask_and_in_batches_as_one_by_one(models, tmp_path):
    auto = train(recipe(models["moe"], tmp_path / "auto"), console=QUIET)
    masked = train(recipe(models["moe"], tmp_path / "masked", "model.attention_implementation=sdpa"), console=QUIET)
    one_batch = ("train.batch_size=2", "train.gradient_accumulation=1")
    batches = train(recipe(models["moe"], tmp_path / "batches", *one_batch), console=QUIET)
    assert losses(auto) == pytest.approx(losses(masked), rel=1e-4)
    assert losses(auto) == pytest.approx(losses(batches), rel=1e-4)


def test_gradient_checkpointing_changes_no_number(models, tmp_path):
    plain = train(recipe(models["moe"], tmp_path / "plain"), console=QUIET)
    checkpointed = train(recipe(models["moe"], tmp_path / "ck", "train.gradient_checkpointing=true"), console=QUIET)
    assert losses(plain) == losses(checkpointed)


def test_bf16_trains_and_keeps_fp32_factors(models, tmp_path):
    exact = train(recipe(models["moe"], tmp_path / "fp32"), console=QUIET)
    run = train(recipe(models["moe"], tmp_path / "run", "train.precision=bf16", "model.dtype=bfloat16"), console=QUIET)
    assert losses(run) == pytest.approx(losses(exact), rel=2e-2)
    assert losses(run) != losses(exact)
    assert {tensor.dtype for tensor in adapter_tensors(run).values()} == {torch.float32}


def test_epochs_decide_when_there_are_no_steps(models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(Path("examples/data/secret-code.jsonl").read_text().splitlines(keepends=True)[:40]))
    overrides = ("train.steps=null", "train.epochs=2", "data.packing=false", f"data.train={rows}", "data.eval=[]")
    run = train(recipe(models["moe"], tmp_path / "run", *overrides, "train.gradient_accumulation=8"), console=QUIET)
    assert run.summary["steps"] == 10
    assert run.summary["eval"] is None


def test_tiles_are_chosen_for_a_micro_batch_and_the_first_step_is_timed(models, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr("finetune.training.loop.tune_experts", lambda model, load: loads.append(load))
    overrides = ("train.steps=2", "train.log_every=1", "train.batch_size=2", "data.max_length=128")
    run = train(recipe(models["moe"], tmp_path / "run", *overrides), console=QUIET)
    top_k = json.loads((models["moe"] / "config.json").read_text())["num_experts_per_tok"]
    assert loads == [(256, top_k)]
    steps = [row for row in RunFolder(run.path).read_metrics() if "loss" in row]
    assert [row["step"] for row in steps if "seconds_to_first_step" in row] == [1]
    assert run.summary["seconds_to_first_step"] == steps[0]["seconds_to_first_step"] > 0


def test_a_loss_that_is_not_finite_ends_the_run(models, tmp_path, monkeypatch):
    own = StepTrainer._own_loss
    broken = lambda self, *given: own(self, *given) * (math.nan if self.state.global_step else 1.0)  # noqa: E731
    monkeypatch.setattr(StepTrainer, "_own_loss", broken)
    with pytest.raises(TrainingError, match="not finite") as error:
        train(recipe(models["moe"], tmp_path / "run"), console=QUIET)
    assert "learning_rate" in str(error.value)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_target_the_model_lacks_is_refused_before_anything_is_written(models, tmp_path):
    with pytest.raises(AdapterError, match="experts"):
        train(recipe(models["dense"], tmp_path / "run"), console=QUIET)


def test_resume_needs_a_checkpoint_and_the_same_recipe(models, tmp_path):
    with pytest.raises(UserError):
        train(recipe(models["moe"], tmp_path / "none"), resume=True, console=QUIET)
    train(recipe(models["moe"], tmp_path / "run"), console=QUIET)
    with pytest.raises(UserError, match=r"adapter\.rank"):
        train(recipe(models["moe"], tmp_path / "run", "adapter.rank=2"), resume=True, console=QUIET)


def test_a_finished_run_resumed_is_the_same_run(models, tmp_path):
    run = train(recipe(models["moe"], tmp_path / "run"), console=QUIET)
    before = {name: value.clone() for name, value in adapter_tensors(run).items()}
    again = train(recipe(models["moe"], tmp_path / "run"), resume=True, console=QUIET)
    assert all(torch.equal(value, before[name]) for name, value in adapter_tensors(again).items())
    assert losses(again) == losses(run)
    assert again.summary["steps"] == 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_offloading_without_a_gpu_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="no GPU here"):
        train(recipe(models["moe"], tmp_path / "run", "train.activation_offload=true"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_first_step_has_a_rate_and_the_rates_after_warm_up_are_those_of_the_schedule(models, tmp_path):
    """Also with fewer steps than rows of metrics."""
    overrides = ("train.warmup=0.5", "train.schedule=linear", "data.packing=false", "data.eval=[]")
    run = train(recipe(models["moe"], tmp_path / "run", *overrides), console=QUIET)
    rates = [row["learning_rate"] for row in RunFolder(run.path).read_metrics() if "loss" in row]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2 / 2])


def test_a_run_with_fewer_steps_than_log_every_ends_with_its_last_loss(models, tmp_path):
    overrides = ("train.log_every=50", "train.steps=2", "train.learning_rate=1e-9", "data.eval=[]")
    out = io.StringIO()
    run = train(recipe(models["moe"], tmp_path / "run", *overrides), console=Console(file=out, width=200))
    assert run.summary["steps"] == 2
    assert len(losses(run)) == 1
    assert "steps: 2, of 2 blocks each; 0 of them warm up; " in out.getvalue()
    assert "warning: 2 steps hardly move an adapter: raise train.steps" in out.getvalue()
    assert "step 2/2 · loss " in out.getvalue()


def test_a_loss_that_did_not_move_is_reported(models, tmp_path):
    overrides = ("train.steps=3", "train.learning_rate=1e-12", "data.eval=[]", "data.packing=false")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path("examples/data/secret-code.jsonl").read_text().splitlines(keepends=True)[0] * 2)
    run = train(recipe(models["moe"], tmp_path / "run", f"data.train={rows}", *overrides), console=QUIET)
    (warning,) = run.summary["warnings"]
    assert "the loss did not move, from" in warning
    assert "higher train.learning_rate" in warning
