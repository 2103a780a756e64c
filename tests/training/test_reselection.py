"""Experts chosen anew while a run trains: the rule, what moves with an expert, and resuming to the bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.attach import attach
from finetune.adapters.delta import Delta
from finetune.adapters.expert_factors import ExpertFactors
from finetune.adapters.factor import Factor
from finetune.errors import RecipeError
from finetune.merging.merge import merge
from finetune.routing.plan import ExpertPlan
from finetune.routing.plan_file import read_plan
from finetune.routing.select import reselect
from finetune.training.reselection import move_experts_, move_state_
from finetune.training.run_folder import RunFolder
from finetune.verification.verify import verify
from tests.adapters.models import BOTH, SOME
from tests.tiny import tiny_moe, token_ids
from tests.training.runs import EXPERTS, adapter_of, losses_of, recipe_of, resumed_from, run_of, save_moe

RESELECT = (
    EXPERTS,
    "experts.select={top_fraction: 0.34}",
    "experts.reselect={every: 2, margin: 0}",
    "train.steps=7",
    "train.save_every=3",
    "train.keep=9",
    "train.learning_rate=0.1",
)


def test_only_a_clear_winner_replaces():
    plan = ExpertPlan({0: (0, 1), 3: (4, 5)}, 6)
    share_LE = np.array([[0.2, 0.1, 0.11, 0.3, 0.15, 0.14], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]])
    assert reselect(plan, share_LE, (0, 3), 0.2).experts_by_layer == {0: (0, 3), 3: (0, 1)}
    assert reselect(plan, share_LE, (0, 3), 10).experts_by_layer == plan.experts_by_layer
    assert reselect(plan, share_LE, (0, 3), 0).experts_by_layer == {0: (0, 3), 3: (0, 1)}


@given(
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.sets(st.integers(0, 5), min_size=1, max_size=6),
    st.floats(0, 2),
)
def test_it_keeps_the_number_and_does_not_come_back(counts, trained, margin):
    share_LE = np.array([counts], dtype=float)
    before = ExpertPlan({0: tuple(trained)}, 6)
    after = reselect(before, share_LE, (0,), margin)
    assert len(after.experts_by_layer[0]) == len(trained)
    assert reselect(after, share_LE, (0,), margin) == after
    left, came = (trained - set(after.experts_by_layer[0])), (set(after.experts_by_layer[0]) - trained)
    assert all(counts[new] > counts[old] for new in came for old in left)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_values_and_moments_follow_their_expert(mode):
    model = attach(tiny_moe(), {"attention": (), "experts": BOTH, "rank": 3}, SOME, seed=0, expert_mode=mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = [part for part in model.modules() if isinstance(part, Factor | Delta)]
    assert len(parts) == (8 if mode == "lora" else 4)
    before = [(part.weight.clone(), {k: v.clone() for k, v in optimizer.state[part.weight].items()}) for part in parts]
    after = ExpertPlan({0: (0, 4), 1: (0, 2, 3)}, 6)  # 1 leaves layer 0, and 0 comes
    move_experts_(model, after, optimizer, torch.Generator().manual_seed(0))
    for part, (weight, state) in zip(parts, before, strict=True):
        now = optimizer.state[part.weight]
        assert now["step"] == state["step"]
        if len(part.experts) == 3:
            assert torch.equal(part.weight, weight)
            continue
        assert part.experts == (0, 4)
        assert part.slot_of_expert.tolist() == [0, -1, -1, -1, 1, -1]
        assert torch.equal(part.weight[1], weight[1])
        assert all(torch.equal(now[name][1], state[name][1]) for name in ("exp_avg", "exp_avg_sq"))
        assert not now["exp_avg"][0].any()
        assert torch.equal(now["exp_avg_sq"][0], state["exp_avg_sq"][1])
        assert bool(part.weight[0].any()) == (getattr(part, "side", None) == "A")
    assert model.peft_config["default"].expert_plan == after
    assert all(m.trained("default").experts in ((0, 4), (0, 2, 3)) for m in model.modules() if _is_host(m))


@pytest.mark.parametrize("names", [("exp_avg", "exp_avg_sq"), ("state1", "state2")])
def test_an_expert_without_a_past_starts_with_the_mean_of_the_second_moments(names):
    """Under the names of torch's AdamW and of bitsandbytes'."""
    state = {name: torch.arange(12.0).reshape(3, 2, 2) + 1 for name in names} | {"step": 5}
    move_state_(state, [2, -1, 0])
    first, second = (state[name] for name in names)
    assert not first[1].any()
    assert torch.equal(second[1], (second[0] + second[2]) / 2)
    assert second[0, 0, 0] == 9
    assert second[2, 0, 0] == 1
    assert state["step"] == 5


def _is_host(module):
    return isinstance(module, ExpertFactors)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, model, tmp_path_factory):
    mode = f"experts.mode={request.param}"
    return run_of(model, tmp_path_factory.mktemp("runs") / "run", *RESELECT, mode), mode


def swaps_of(run):
    return [row for row in RunFolder(run.path).read_metrics() if "experts_swapped" in row]


def test_experts_are_swapped_and_the_adapter_says_which_train(run):
    run, _ = run
    rows = swaps_of(run)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert sum(row["experts_swapped"] for row in rows) > 0
    plan = {layer: set(experts) for layer, experts in read_plan(RunFolder(run.path).plan).experts_by_layer.items()}
    for row in rows:
        for layer, change in row.get("reselected", {}).items():
            assert set(change["left"]) <= plan[int(layer)]
            assert len(change["left"]) == len(change["came"])
            plan[int(layer)] = plan[int(layer)] - set(change["left"]) | set(change["came"])
    saved = json.loads((run.adapter / "finetune_adapter.json").read_text())["experts"]["experts_by_layer"]
    assert {int(layer): set(experts) for layer, experts in saved.items()} == plan


@pytest.mark.parametrize("step", [6, 3])  # at a choice, and between two: there the counts matter
def test_resumed_it_is_the_same_run(run, model, step):
    run, mode = run
    before, losses, swaps = adapter_of(run), losses_of(run), swaps_of(run)
    again = resumed_from(run, step, model, *RESELECT, mode)
    assert losses_of(again) == losses
    assert swaps_of(again) == swaps
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(again).items())


def test_experts_that_left_have_the_bits_of_the_base(run, model, tmp_path):
    from tests.checkpoints import read_all

    run, _ = run
    merge(run.adapter, tmp_path / "merged")
    verify(run.adapter, tmp_path / "merged")
    saved = json.loads((run.adapter / "finetune_adapter.json").read_text())["experts"]["experts_by_layer"]
    before, after = read_all(model), read_all(tmp_path / "merged")
    for name in before:
        if ".mlp.experts." in name and int(name.split(".")[5]) not in saved[name.split(".")[2]]:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("experts.select=null",), "every expert trains"),
        (("experts.score=gate",), "counts tokens"),
        (("experts.hot={rank: 8, top_fraction: 0.1}",), "different ranks"),
        (("train.optimizer=adamw_8bit",), "adamw_8bit packs it across"),
        (("train.optimizer=paged_adamw_8bit",), "paged_adamw_8bit packs it across"),
    ],
)
def test_what_makes_no_sense_is_refused(model, tmp_path, overrides, match):
    with pytest.raises(RecipeError, match=match):
        recipe_of(model, tmp_path / "run", *RESELECT, *overrides)
