"""Runs that train the weights of the chosen experts themselves."""

import pytest
import torch

from finetune.config.schema import QuantizeSection
from finetune.errors import RecipeError
from finetune.merging.merge import merge
from finetune.models.checkpoint import Checkpoint
from finetune.quant.dequantized import DequantizedCheckpoint
from finetune.routing.plan_file import read_plan
from finetune.training.run_folder import RunFolder
from finetune.verification.verify import verify
from tests.training.runs import EXPERTS, adapter_of, losses_of, resumed_from, run_of, save_moe

WHOLE = (EXPERTS, "experts.mode=full", "experts.select={top_fraction: 0.34}", "train.learning_rate=1e-2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return run_of(model, tmp_path_factory.mktemp("runs") / "run", *WHOLE, "train.save_every=2")


def test_the_chosen_experts_learn(run, model, tmp_path):
    idle = run_of(model, tmp_path / "idle", *WHOLE, "train.learning_rate=1e-12")
    assert losses_of(run)[-1] < losses_of(idle)[-1] - 0.1
    deltas = {name: value for name, value in adapter_of(run).items() if "lora_delta" in name}
    assert len(deltas) == 4
    assert all(value.shape[0] == 2 and value.any() for value in deltas.values())


def test_the_optimizer_knows_the_chosen_experts_only(run):
    state = torch.load(RunFolder(run.path).checkpoints / "checkpoint-4" / "optimizer.pt", weights_only=True)
    sizes = [entry["exp_avg"].shape for entry in state["state"].values()]
    assert sum(len(shape) == 3 for shape in sizes) == 4
    assert all(shape[0] == 2 for shape in sizes if len(shape) == 3)


def test_resumed_it_is_the_same_run(run, model):
    before, losses = adapter_of(run), losses_of(run)
    again = resumed_from(run, 2, model, *WHOLE, "train.save_every=2")
    assert losses_of(again) == losses
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(again).items())


def test_checkpointing_and_accumulation_change_little(run, model, tmp_path):
    checkpointed = run_of(model, tmp_path / "ck", *WHOLE, "train.gradient_checkpointing=true")
    assert losses_of(checkpointed) == losses_of(run)
    cut = ("train.batch_size=4", "train.gradient_accumulation=1")
    assert losses_of(run_of(model, tmp_path / "cut", *WHOLE, *cut)) == pytest.approx(losses_of(run), rel=1e-3)


def test_it_merges_and_frozen_experts_keep_their_bits(run, model, tmp_path):
    merge(run.adapter, tmp_path / "merged")
    verify(run.adapter, tmp_path / "merged")
    from tests.checkpoints import read_all

    before, after, plan = read_all(model), read_all(tmp_path / "merged"), read_plan(RunFolder(run.path).plan)
    for name in before:
        if ".mlp.experts." in name:
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            assert torch.equal(before[name], after[name]) == (expert not in plan.experts_by_layer[layer]), name


def test_bf16_keeps_fp32_changes(run, model, tmp_path):
    half = run_of(model, tmp_path / "run", *WHOLE, "train.precision=bf16", "model.dtype=bfloat16")
    assert {value.dtype for value in adapter_of(half).values()} == {torch.float32}
    assert losses_of(half) == pytest.approx(losses_of(run), rel=2e-2)


def test_over_packed_experts_the_changes_are_for_either_base(run, model, tmp_path):
    """Training runs through NF4; the change is added to the stored weights, or to those that training saw."""
    nf4 = (*WHOLE, "quantize.scheme=nf4", "train.save_every=2")
    packed = run_of(model, tmp_path / "run", *nf4)
    idle = run_of(model, tmp_path / "idle", *nf4, "train.learning_rate=1e-12")
    assert losses_of(packed)[-1] < losses_of(idle)[-1] - 0.1
    assert losses_of(packed) != losses_of(run)
    again = resumed_from(packed, 2, model, *nf4)
    before = adapter_of(packed)
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(again).items())
    section = QuantizeSection(scheme="nf4", compute_dtype="float32")
    frozen = {
        "original": Checkpoint.open(model),
        "dequantized": DequantizedCheckpoint.of(Checkpoint.open(model), section),
    }
    plan = read_plan(RunFolder(packed.path).plan)
    for kind, base in frozen.items():
        merge(packed.adapter, tmp_path / kind, onto=kind)
        verify(packed.adapter, tmp_path / kind, onto=kind)
        merged = Checkpoint.open(tmp_path / kind)
        for name in (name for name in merged.tensors if ".mlp.experts." in name):
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            trained = expert in plan.experts_by_layer[layer]
            assert torch.equal(merged.read(name), base.read(name)) != trained, name


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("experts.select=null",), "no rule chooses"),
        (("adapter.expert_rank=2",), "trains no factors on experts"),
        (("adapter.experts=[]",), r"adapter\.experts is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(model, tmp_path, overrides, match):
    with pytest.raises(RecipeError, match=match):
        run_of(model, tmp_path / "run", *WHOLE, *overrides)
