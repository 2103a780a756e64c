"""The monitor's numbers against plain counting, and when it warns."""

import numpy as np
import pytest
import torch

from finetune.routing.collect import profile_routing
from finetune.routing.plan import ExpertPlan
from finetune.routing.watch import LoadCounter, Look, Probe, overlap
from tests.routing.profiles import random_rows
from tests.tiny import tiny_moe, token_ids


def test_load_of_training_steps_without_padding_and_without_evaluation():
    model = tiny_moe().train()
    rows = random_rows(4)
    expected = profile_routing(model, rows).token_counts_LE
    length = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(4, length, dtype=torch.long), torch.zeros(4, length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    counter = LoadCounter(model.model, 6)
    with counter.listening(), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        model.eval()
        model(input_ids=ids, attention_mask=mask)
        model.train()
        assert np.array_equal(counter.take().numpy(), expected)
        assert counter.take().sum() == 0
        model(input_ids=token_ids())
        assert counter.take().sum() == 2 * 2 * token_ids().numel()
    model(input_ids=ids)
    assert counter.take().sum() == 0


def test_the_probe_sees_what_a_profile_sees_and_leaves_no_trace():
    model, rows = tiny_moe().train(), random_rows(5)
    probe = Probe(model.model, rows, 6)
    state = torch.get_rng_state()
    choices = probe.choices()
    assert np.array_equal(probe.load(choices), profile_routing(model, rows).token_counts_LE)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert overlap(choices, choices) == [1.0, 1.0]


def test_overlap_counts_choices_in_whatever_order():
    base = [torch.tensor([[0, 1], [2, 3]])]
    assert overlap([torch.tensor([[1, 0], [3, 4]])], base) == [0.75]
    assert overlap([torch.tensor([[2, 3], [0, 1]])], base) == [0.0]


def look(load, probe=None, over=(1.0, 1.0)) -> Look:
    return Look((0, 2), np.array(load), np.array(load if probe is None else probe), list(over))


EVEN = [[5, 5, 5, 5]] * 2


def test_a_row_of_metrics():
    row = look([[6, 2, 0, 0], [1, 1, 1, 1]], over=(0.5, 1.0)).to_row(ExpertPlan({0: (0,), 2: (0, 3)}, 4))
    assert (row["router_overlap"], row["dead_experts"], row["routed_to_trained"]) == (0.75, 2, 0.625)
    assert row["routing"]["layers"] == [0, 2]
    assert row["routing"]["load"] == [[0.75, 0.25, 0, 0], [0.25] * 4]
    assert row["routing"]["trained"] == [0.75, 0.5]
    assert row["routing"]["dead"] == [2, 0]
    assert look(EVEN).to_row(None)["routed_to_trained"] == 1.0


def test_warnings_come_with_advice_and_only_for_a_reason():
    base = look(EVEN)
    assert look(EVEN, over=(0.6, 0.9)).warnings(base) == {}
    assert look([[20, 0, 0, 0]] * 2, EVEN).warnings(base) == {}  # the rows of these steps, not the router
    drift = look(EVEN, over=(0.9, 0.4)).warnings(base)
    assert list(drift) == ["drift"]
    assert "layer 2" in drift["drift"]
    assert "learning_rate" in drift["drift"]
    collapse = look(EVEN, [[5, 5, 5, 5], [20, 0, 0, 0]]).warnings(base)
    assert list(collapse) == ["collapse"]
    assert "layer 2" in collapse["collapse"]


@pytest.mark.parametrize("mode", ["bfloat16", "float32"])
def test_adapted_models_are_watched_through_their_adapters(mode):
    from finetune.adapters.attach import attach
    from tests.adapters.models import randomize

    model = attach(tiny_moe(dtype=getattr(torch, mode)), {"experts": ("gate_up_proj", "down_proj"), "rank": 3}, seed=0)
    decoder = model.get_base_model().model
    probe = Probe(decoder, random_rows(5), 6)
    assert overlap(probe.choices(), base := probe.choices()) == [1.0, 1.0]
    randomize(model, std=1.0)
    assert min(overlap(probe.choices(), base)) < 1.0
    with model.disable_adapter():
        assert overlap(probe.choices(), base) == [1.0, 1.0]
