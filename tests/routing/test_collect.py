"""Profiles of live models against the definition, and that batching cannot change them."""

import numpy as np
import pytest
import torch

from finetune.errors import RoutingError
from finetune.routing.collect import Measure, profile_routing, take_sample
from finetune.routing.profile_file import profile_to_dict
from tests.routing.profiles import random_rows
from tests.tiny import tiny_dense, tiny_moe

ALL = Measure(output_mass=True, gradient=True)
SUMS = ("gate_mass_LE", "output_mass_LE", "gradient_LE")


@pytest.fixture(scope="module")
def model():
    model = tiny_moe(dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped products of torch know no float64
    return model


@pytest.fixture(scope="module")
def profile(model):
    return profile_routing(model, random_rows(), ALL)


def inputs_of_experts(model, row):
    inputs = {}
    hooks = [
        layer.mlp.experts.register_forward_hook(lambda module, args, out, i=i: inputs.update({i: (module, *args)}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([row["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return inputs


def by_definition(model, rows, loss_only=False):
    """Counts, gate mass and output mass, one row at a time, one expert at a time."""
    shape = (len(model.model.layers), model.config.num_experts)
    counts, gate, mass = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
    for row in rows:
        for layer, (bank, x, index, weights) in inputs_of_experts(model, row).items():
            for t, label in enumerate(row["labels"]):
                if loss_only and label == -100:
                    continue
                for expert, weight in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                    g, u = (bank.gate_up_proj[expert] @ x[t]).chunk(2)
                    y = bank.down_proj[expert] @ (torch.nn.functional.silu(g) * u)
                    counts[layer, expert] += 1
                    gate[layer, expert] += weight
                    mass[layer, expert] += weight * float(y.detach().norm())
    return counts, gate, mass


def test_sums_are_what_they_are_defined_to_be(model, profile):
    counts, gate, mass = by_definition(model, random_rows())
    assert np.array_equal(profile.token_counts_LE, counts)
    assert profile.gate_mass_LE == pytest.approx(gate, abs=1e-6)
    assert profile.output_mass_LE == pytest.approx(mass, abs=1e-4)
    assert profile.num_tokens == sum(len(row["input_ids"]) for row in random_rows())
    assert np.array_equal(profile.half_counts_LE, by_definition(model, random_rows()[::2])[0])


def test_loss_carrying_tokens_only(model):
    profile = profile_routing(model, random_rows(), Measure(loss_tokens_only=True))
    counts, gate, _ = by_definition(model, random_rows(), loss_only=True)
    assert np.array_equal(profile.token_counts_LE, counts)
    assert profile.gate_mass_LE == pytest.approx(gate, abs=1e-6)
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in random_rows()]
    with pytest.raises(RoutingError, match="no token to count"):
        profile_routing(model, silent, Measure(loss_tokens_only=True))


def test_gradient_is_gradient_times_weight_of_the_down_projection():
    """With one pair per expert there is nothing to cancel: |gradient x weight|, summed over the matrix."""
    model = tiny_moe(dtype=torch.float64, num_experts=16)
    model.set_experts_implementation("eager")
    row = {"input_ids": [5, 9, 17], "labels": [-100, 9, 17]}
    profile = profile_routing(model, [row], Measure(gradient=True))
    down = [layer.mlp.experts.down_proj for layer in model.model.layers]
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row["input_ids"][1:]), reduction="sum")
    gradients = torch.autograd.grad(loss, down)
    product = np.stack([(g * w).sum((1, 2)).detach().numpy() for g, w in zip(gradients, down, strict=True)])
    single = profile.token_counts_LE == 1
    assert single.sum() >= 4
    assert profile.gradient_LE[single] == pytest.approx(np.abs(product[single]), abs=1e-7)
    assert (profile.gradient_LE >= np.abs(product) - 1e-7).all()


def test_a_model_that_gives_no_numbers_is_told():
    broken = tiny_moe()
    with torch.no_grad():
        broken.model.layers[0].input_layernorm.weight[3] = float("nan")
    with pytest.raises(RoutingError, match="no finite numbers"):
        profile_routing(broken, random_rows(3))


def test_the_model_is_left_as_it_was(model):
    model.train()
    profile_routing(model, random_rows(2), ALL)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


@pytest.mark.parametrize("block_tokens", [1, 40, 10**6])
def test_blocks_isolate_rows_and_do_not_change_the_profile(model, profile, block_tokens):
    other = profile_routing(model, random_rows(), ALL, block_tokens=block_tokens)
    assert np.array_equal(other.token_counts_LE, profile.token_counts_LE)
    assert np.array_equal(other.half_counts_LE, profile.half_counts_LE)
    for name in SUMS:  # rounded to steps of at most 2^-24, so the last bits of float64 arithmetic cannot show
        assert np.array_equal(getattr(other, name), getattr(profile, name)), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_kernel_of_the_experts_does_not_change_the_counts(implementation):
    model = tiny_moe()
    expected = profile_routing(model, random_rows(), ALL)
    model.set_experts_implementation(implementation)
    other = profile_routing(model, random_rows(), ALL)
    assert np.array_equal(other.token_counts_LE, expected.token_counts_LE)
    for name in SUMS:
        assert getattr(other, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


def test_again_it_is_the_same_to_the_bit():
    one, two = (profile_to_dict(profile_routing(tiny_moe(), random_rows(), ALL)) for _ in range(2))
    assert one == two


def test_dense_layers_between_have_no_row():
    model = tiny_moe(num_hidden_layers=3, mlp_only_layers=[1])
    profile = profile_routing(model, random_rows(3))
    assert profile.layer_indices == (0, 2)
    with pytest.raises(RoutingError, match="has no experts"):
        profile_routing(tiny_dense(), random_rows(3))


def test_samples_take_whole_rows_up_to_a_number_of_tokens():
    rows = random_rows()
    lengths = [len(row["input_ids"]) for row in rows]
    assert take_sample(rows, 10**9) == rows
    assert take_sample(rows, 1) == rows[:1]
    assert take_sample(rows, sum(lengths[:5])) == rows[:5]
    assert take_sample(rows, sum(lengths[:5]) - 1) == rows[:4]
    assert take_sample(rows, 10**9, max_rows=3) == rows[:3]
