import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.adapters.files import pack_a, pack_b, unpack_a, unpack_b
from finetune.errors import AdapterError


@st.composite
def banks(draw):
    num_experts, rank = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    slots = draw(st.permutations(range(num_experts)))[: draw(st.integers(0, num_experts))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    a = torch.randn(len(slots), rank, width, generator=generator)
    b = torch.randn(len(slots), height, rank, generator=generator)
    return num_experts, rank, slots, a, b


@settings(max_examples=60, deadline=None)
@given(banks())
def test_packing_is_stock_pefts_and_exact(bank):
    num_experts, rank, slots, a, b = bank
    stock_a, stock_b = pack_a(a, slots, num_experts), pack_b(b, slots, num_experts)
    assert stock_a.shape == (num_experts * rank, a.shape[-1])
    assert stock_b.shape == (b.shape[1], rank * num_experts)
    # peft.tuners.lora.layer.ParamWrapper.get_delta_weight
    a_ERI = stock_a.reshape(num_experts, -1, stock_a.shape[-1])
    b_ORE = stock_b.reshape(stock_b.shape[0], -1, num_experts)
    delta = torch.einsum("o r e, e r i -> e o i", b_ORE, a_ERI)
    for slot, expert in enumerate(slots):
        assert torch.allclose(delta[expert], b[slot] @ a[slot], atol=1e-5)
    assert not delta[sorted(set(range(num_experts)) - set(slots))].any()
    assert torch.equal(unpack_a(stock_a, slots, num_experts, rank), a)
    assert torch.equal(unpack_b(stock_b, slots, num_experts, rank), b)


def test_trained_expert_outside_the_plan_is_not_dropped():
    stock = pack_b(torch.ones(3, 4, 2), [0, 2, 3], 5)
    with pytest.raises(AdapterError, match=r"outside the expert plan, got \[2\]"):
        unpack_b(stock, [0, 3, 4], 5, 2)


@pytest.mark.parametrize("slots", [[0, 0], [0], [0, 5], [-1, 2]])
def test_bad_slots(slots):
    for pack, factor in ((pack_a, torch.ones(2, 3, 4)), (pack_b, torch.ones(2, 4, 3))):
        with pytest.raises(AdapterError, match="slots"):
            pack(factor, slots, 5)


def test_wrong_shapes():
    with pytest.raises(AdapterError, match="lora_A"):
        unpack_a(torch.ones(9, 4), [0], 5, 2)
    with pytest.raises(AdapterError, match="lora_B"):
        unpack_b(torch.ones(4, 9), [0], 5, 2)
    with pytest.raises(AdapterError, match="lora_A"):
        unpack_a(torch.ones(10), [0], 5, 2)
