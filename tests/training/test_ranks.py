"""Runs in which the hottest experts have a larger rank than the others."""

import pytest
import torch

from finetune.errors import RecipeError
from finetune.merging.merge import merge
from finetune.routing.plan_file import read_plan
from finetune.routing.profile_file import read_profile
from finetune.training.run_folder import RunFolder
from finetune.verification.verify import verify
from tests.training.runs import EXPERTS, adapter_of, losses_of, recipe_of, resumed_from, run_of, save_moe

HOT = (EXPERTS, "experts.select={top_fraction: 0.5}", "experts.hot={rank: 6, top_fraction: 0.17}", "train.save_every=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return run_of(model, tmp_path_factory.mktemp("runs") / "run", *HOT)


def test_the_hottest_expert_has_the_larger_rank(run):
    folder = RunFolder(run.path)
    plan, counts = read_plan(folder.plan), read_profile(folder.routing).token_counts_LE
    for layer, experts in plan.experts_by_layer.items():
        hottest = max(experts, key=lambda expert: counts[layer][expert])
        ranks = dict(zip(experts, plan.ranks_by_layer[layer], strict=True))
        assert ranks.pop(hottest) == 6
        assert set(ranks.values()) == {4}


def test_the_optimizer_holds_the_sum_of_the_ranks(run):
    state = torch.load(RunFolder(run.path).checkpoints / "checkpoint-4" / "optimizer.pt", weights_only=True)
    shapes = [tuple(entry["exp_avg"].shape) for entry in state["state"].values()]
    assert sum(shape[0] == 6 + 4 + 4 for shape in shapes) == 8


def test_parts_beyond_a_rank_stay_zero(run):
    plan = read_plan(RunFolder(run.path).plan)
    for name, value in adapter_of(run).items():
        if "experts" in name and "lora_B" in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            b_EOR = value.view(value.shape[0], 6, 6).permute(2, 0, 1)
            for expert, rank in zip(plan.experts_by_layer[layer], plan.ranks_by_layer[layer], strict=True):
                assert b_EOR[expert, :, :rank].any()
                assert not b_EOR[expert, :, rank:].any()


def test_resumed_merged_and_verified(run, model, tmp_path):
    before, losses = adapter_of(run), losses_of(run)
    again = resumed_from(run, 2, model, *HOT)
    assert losses_of(again) == losses
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(again).items())
    merge(run.adapter, tmp_path / "merged")
    verify(run.adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("experts.select=null",), "no rule chooses"),
        (("experts.select={budget: 100K}",), "counts every expert at one rank"),
        (("experts.mode=full",), "trains no factors"),
    ],
)
def test_what_makes_no_sense_is_refused(model, tmp_path, overrides, match):
    with pytest.raises(RecipeError, match=match):
        recipe_of(model, tmp_path / "run", *HOT, *overrides)
