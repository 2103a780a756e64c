"""Training through packed weights: the same walk as without, and an adapter for the 16-bit model at its end."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

import finetune as ft
from finetune.errors import ModelError
from finetune.pipeline import train
from finetune.quant.experts import PackedExperts
from finetune.quant.linear import is_linear_4bit
from tests.training.test_sft import QUIET, adapter_tensors, losses, models, recipe  # noqa: F401

NF4 = ("quantize.scheme=nf4", "train.eval_every=3", "train.save_every=2")
ADAPTER = "{attention: [q_proj, o_proj], experts: [gate_up_proj, down_proj], rank: 4, alpha: 8, dropout: 0.1}"


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):  # noqa: F811
    """A run through NF4 that was never interrupted."""
    made = recipe(models["moe"], tmp_path_factory.mktemp("nf4") / "run", *NF4, adapter=ADAPTER)
    return train(made, console=QUIET)


def test_it_learns_and_keeps_fp32_factors(run):
    assert losses(run)[-1] < losses(run)[0]
    assert {tensor.dtype for tensor in adapter_tensors(run).values()} == {torch.float32}


def test_a_resumed_run_has_the_same_bits(models, run, tmp_path):  # noqa: F811
    made = recipe(models["moe"], tmp_path / "run", *NF4, adapter=ADAPTER)
    cut = train(made, console=QUIET)
    shutil.rmtree(cut.path / "checkpoints/checkpoint-4")
    shutil.rmtree(cut.adapter)
    resumed = train(made, resume=True, console=QUIET)
    want = adapter_tensors(run)
    assert all(torch.equal(tensor, want[name]) for name, tensor in adapter_tensors(resumed).items())
    assert losses(resumed) == losses(run)


def test_packed_folders_and_experts_on_disk_train_the_same(models, run, tmp_path):  # noqa: F811
    ft.quantize(models["moe"], tmp_path / "packed", {"scheme": "nf4"}, console=QUIET)
    for resident in ("all", "mmap"):
        made = recipe(tmp_path / "packed", tmp_path / resident, *NF4, f"quantize.resident={resident}", adapter=ADAPTER)
        same = train(made, console=QUIET)
        assert losses(same) == losses(run)
        assert json.loads((same.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            models["moe"]
        )


def test_the_adapter_is_for_the_16_bit_model(run, models, tmp_path):  # noqa: F811
    adapted, _ = ft.load(run.adapter, torch.float32, base_weights="original")
    assert not any(isinstance(module, PackedExperts) or is_linear_4bit(module) for module in adapted.modules())
    base, _ = ft.load(models["moe"], torch.float32)
    stock = PeftModel.from_pretrained(base, run.adapter)
    ids = torch.randint(5, 700, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (stock(ids).logits - adapted(ids).logits).abs().max() < 1e-4
    ft.merge(run.adapter, tmp_path / "merged", dtype="fp32", console=QUIET)
    ft.verify(run.adapter, tmp_path / "merged")  # raises when they differ


def test_what_cannot_be_loaded_is_said_before_a_run_begins(models, tmp_path):  # noqa: F811
    made = recipe(models["moe"], tmp_path / "run", *NF4, "quantize.resident=mmap", adapter=ADAPTER)
    with pytest.raises(ModelError, match=r"quantize\.resident"):
        train(made, console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_profile_and_plan_work_on_packed_models(models, tmp_path, scheme):  # noqa: F811
    options = (f"quantize.scheme={scheme}", "experts.select.top_fraction=0.34")
    adapter = "{attention: [], experts: [gate_up_proj, down_proj], rank: 2}"
    made = recipe(models["moe"], tmp_path / "run", *options, "experts.score=mass", "train.steps=2", adapter=adapter)
    chosen = train(made, console=QUIET)
    assert chosen.summary["trained_experts"] == 2 * 2
    assert all(tensor.shape for tensor in adapter_tensors(chosen).values())


def test_gradient_checkpointing_changes_no_number(models, run, tmp_path):  # noqa: F811
    made = recipe(models["moe"], tmp_path / "run", *NF4, "train.gradient_checkpointing=true", adapter=ADAPTER)
    assert losses(train(made, console=QUIET)) == losses(run)


@pytest.mark.slow
def test_the_embedded_model_learns_its_new_skill_in_4_bits(tmp_path):
    options = ("quantize.scheme=nf4", f"output.dir={tmp_path / 'run'}")
    learned = train(ft.load_recipe("recipes/quickstart.yaml", *options), console=QUIET)
    assert learned.summary["eval"]["exact_match"] > 0.85
