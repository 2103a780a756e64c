"""Factors: compact parameters, stock PEFT's layout in state dicts."""

import pytest
import torch

from finetune.adapters.factor import Factor
from finetune.errors import AdapterError

SHAPES = {"A": (3, 4, 7), "B": (3, 7, 4)}


def factor(side, experts=(5, 0, 2)):
    made = Factor(side, experts, num_experts=6, rank=4, width=7)
    made.fill_uniform_(1.0)
    return made


@pytest.mark.parametrize("side", ["A", "B"])
def test_the_parameter_is_compact_and_the_state_dict_is_stock(side):
    made = factor(side)
    assert made.weight.shape == SHAPES[side]
    assert made.slot_of_expert.tolist() == [1, -1, 2, -1, -1, 0]
    state = made.state_dict()
    assert list(state) == ["weight"]
    assert state["weight"].shape == made.stock_shape == ((24, 7) if side == "A" else (7, 24))
    assert not state["weight"].requires_grad
    blocks = state["weight"].view(6, 4, 7) if side == "A" else state["weight"].view(7, 4, 6).permute(2, 0, 1)
    for expert in range(6):
        slot = int(made.slot_of_expert[expert])
        assert torch.equal(blocks[expert], made.weight[slot] if slot >= 0 else torch.zeros(SHAPES[side][1:]))


@pytest.mark.parametrize("side", ["A", "B"])
def test_loads_what_it_saves_and_the_compact_form(side):
    made, stock, compact = factor(side), factor(side), factor(side)
    stock.load_state_dict(made.state_dict())
    compact.load_state_dict({"weight": made.weight.detach()})
    assert torch.equal(stock.weight, made.weight)
    assert torch.equal(compact.weight, made.weight)
    assert made.state_dict(keep_vars=True)["weight"] is made.weight


@pytest.mark.parametrize("side", ["A", "B"])
def test_loads_into_a_factor_on_meta(side):
    made = factor(side)
    with torch.device("meta"):
        empty = Factor(side, (5, 0, 2), num_experts=6, rank=4, width=7)
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty.weight, made.weight)


def test_refuses_a_b_outside_its_experts_but_any_a():
    everyone = factor("B", range(6)).state_dict()
    with pytest.raises(AdapterError, match=r"trained experts outside the expert plan, got \[1, 3, 4\]"):
        factor("B").load_state_dict(everyone)
    few = factor("A")
    everyone = factor("A", range(6))
    few.load_state_dict(everyone.state_dict())  # stock PEFT starts every A at random; without its B it does nothing
    assert torch.equal(few.weight, everyone.weight[[5, 0, 2]])


def test_a_wrong_shape_is_refused():
    with pytest.raises(AdapterError, match="lora_A"):
        factor("A").load_state_dict({"weight": torch.zeros(25, 7)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        factor("A").load_state_dict({"weight": torch.zeros(2, 4, 7)})


def test_an_expert_starts_the_same_whichever_others_train():
    every, part = Factor("A", range(6), 6, 3, 8), Factor("A", (1, 4), 6, 3, 8)
    for factor in (every, part):
        torch.manual_seed(0)
        factor.fill_uniform_(0.5)
    assert torch.equal(part.weight, every.weight[[1, 4]])
    assert every.weight.abs().max() <= 0.5
    assert part.weight.requires_grad
