"""Experts with ranks of their own: fewer parameters, the same arithmetic, the standard layout."""

import pytest
import torch

from finetune.adapters.attach import attach, check_same_plan, load_adapter, save_adapter
from finetune.adapters.factor import Factor
from finetune.errors import AdapterError
from finetune.merging.merge import merge
from finetune.models.loading import load_model
from finetune.routing.plan import ExpertPlan
from finetune.verification.verify import verify
from tests.adapters.models import BOTH, logits, randomize, tensors_of
from tests.checkpoints import MOE, plain_logits, stock_logits, write_base
from tests.tiny import tiny_moe, token_ids

SECTION = {"attention": ("q_proj",), "experts": BOTH, "rank": 3, "alpha": 6.0}
PLAN = ExpertPlan({0: (4, 1), 1: (0, 2, 3)}, 6, {0: (5, 2), 1: (1, 5, 2)})


def ranked(plan=PLAN, **section):
    return randomize(attach(tiny_moe(), {**SECTION, **section}, plan, seed=0))


def factors_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Factor)}


def as_one_rank(model):
    """The same adapter with every expert at rank 5, zero where `model` has nothing."""
    wide = attach(tiny_moe(), {**SECTION, "expert_rank": 5}, ExpertPlan(PLAN.experts_by_layer, 6), seed=0)
    wide.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" in name}, strict=False)
    return wide


def test_ranks_follow_their_experts():
    assert PLAN.experts_by_layer[0] == (1, 4)
    assert PLAN.ranks_by_layer == {0: (2, 5), 1: (1, 5, 2)}
    assert ExpertPlan.from_dict(PLAN.to_dict()) == PLAN


@pytest.mark.parametrize(
    "ranks", [{0: (5, 2)}, {0: (5,), 1: (1, 5, 2)}, {0: (5, 0), 1: (1, 5, 2)}, {0: (5, 2), 1: (1, 5, 2), 2: (1,)}]
)
def test_ranks_that_do_not_fit_the_experts_are_refused(ranks):
    with pytest.raises(AdapterError, match="ranks_by_layer"):
        ExpertPlan({0: (4, 1), 1: (0, 2, 3)}, 6, ranks)


def test_parameters_are_the_sum_of_the_ranks():
    shapes = sorted(tuple(factor.weight.shape) for factor in factors_of(ranked()).values())
    assert shapes == sorted(
        (total, width)
        for total in (7, 8)
        for width in (32, 48, 24, 32)  # A and B of gate_up and of down
    )


@pytest.mark.parametrize("rslora", [True, False])
def test_outputs_and_gradients_are_those_of_one_rank_padded_with_zeros(rslora):
    ranks = ranked(rslora=rslora)
    wide = attach(
        tiny_moe(),
        {**SECTION, "rslora": rslora, "expert_rank": 5},
        ExpertPlan(PLAN.experts_by_layer, 6),
        seed=0,
    )
    wide.load_state_dict({name: p for name, p in ranks.state_dict().items() if "lora_" in name}, strict=False)
    assert torch.allclose(logits(ranks), logits(wide), atol=1e-6)
    for model in (ranks, wide):
        model(token_ids(), labels=token_ids()).loss.backward()
    others = factors_of(wide)
    for name, factor in factors_of(ranks).items():
        padded = factor._padded(factor.weight.grad)
        assert torch.allclose(padded, others[name].weight.grad, rtol=1e-4, atol=1e-7)


def test_the_scale_is_the_sections_whatever_the_rank():
    (one,) = {module.scaling["default"] for module in ranked().modules() if hasattr(module, "projection")}
    assert one == pytest.approx(2.0)


def test_an_expert_starts_the_same_with_a_smaller_rank():
    alone = attach(tiny_moe(), SECTION, PLAN, seed=0)
    all_five = ExpertPlan(PLAN.experts_by_layer, 6, {0: (5, 5), 1: (5, 5, 5)})
    other = factors_of(attach(tiny_moe(), SECTION, all_five, seed=0))
    for name, factor in factors_of(alone).items():
        start, wide = factor.slots(), other[name].slots()
        for slot, rank in enumerate(factor.ranks):
            if factor.side == "A":
                assert torch.equal(start[slot, :rank], wide[slot, :rank])


def test_saved_and_loaded(tmp_path):
    model = ranked().eval()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_moe(), tmp_path / "adapter", trainable=True).eval()
    mine = tensors_of(model)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in tensors_of(again).items())
    assert torch.equal(logits(again), logits(model))
    check_same_plan(again, tmp_path / "adapter")
    other = ExpertPlan(PLAN.experts_by_layer, 6, {0: (5, 2), 1: (1, 5, 2)})
    with pytest.raises(AdapterError, match="trained ranks"):
        check_same_plan(ranked(other), tmp_path / "adapter")


def test_a_file_with_values_beyond_the_ranks_is_refused(tmp_path):
    save_adapter(as_one_rank(ranked()), tmp_path / "fits")
    wide = attach(tiny_moe(), {**SECTION, "expert_rank": 5}, ExpertPlan(PLAN.experts_by_layer, 6), seed=0)
    stock = {name: tensor for name, tensor in randomize(wide).state_dict().items() if "lora_" in name}
    with pytest.raises(AdapterError, match="beyond the ranks"):
        ranked().load_state_dict(stock, strict=False)


def test_stock_peft_merge_and_verify_agree(tmp_path):
    base = write_base(tmp_path / "base", MOE)
    plan = ExpertPlan({0: (0, 3), 1: (2,)}, 5, {0: (4, 1), 1: (2,)})
    model = randomize(attach(load_model(base, dtype=torch.float32), SECTION, plan, seed=0)).eval()
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert (stock_logits(base, tmp_path / "adapter") - plain_logits(tmp_path / "merged")).abs().max() <= 1e-4
    verify(tmp_path / "adapter", tmp_path / "merged")
