"""Memory by what holds it: against counts of live tensors, and against peaks that were measured on a GPU."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest

from finetune.planning.activations import Kind, layer_bytes, layer_kinds
from finetune.planning.device import GIB, card_of_size, processor
from finetune.planning.plan import plan_run
from finetune.planning.trained import active_parameters, trained
from tests.planning.shapes import CONFIGS, recipe, shape


@pytest.mark.parametrize(("mode", "kept"), [("off", 103_436), ("selective", 45_952), ("full", 4_096)])
def test_what_is_kept_is_what_lives_after_forward(mode, kept):
    """Counted by benchmarks/kept_bytes.py."""
    asked = recipe(train={"gradient_checkpointing": mode})
    assert layer_bytes(asked, shape("30B-A3B"), Kind(linear=False, sparse=True)).kept == kept


@pytest.mark.parametrize(
    ("targets", "kept"), [([], 43_352 * 2 - 264), (["gate_proj", "up_proj", "down_proj"], 103_016)]
)
def test_what_a_dense_layer_keeps_in_32_bit(targets, kept):
    """Counted in the same way."""
    fp32 = {"precision": "fp32"}
    asked = recipe(model={"dtype": "float32"}, train=fp32, adapter={"experts": [], "mlp": targets})
    assert layer_bytes(asked, shape("0.6B"), Kind(linear=False, sparse=False)).kept == kept


MEASURED = [
    ({}, 1, 4096, 68.4),
    ({}, 4, 4096, 70.8),
    ({}, 1, 16_384, 70.8),
    ({"scheme": "nf4", "attention": False}, 1, 4096, 28.4),
    ({"scheme": "nf4", "attention": False}, 4, 4096, 31.3),
    ({"scheme": "nf4", "attention": False}, 1, 32_768, 37.4),
    ({"scheme": "fp8"}, 1, 4096, 41.4),
]


@pytest.mark.parametrize(("quantize", "rows", "tokens", "peak_gib"), MEASURED)
def test_peaks_that_a_gpu_had(quantize, rows, tokens, peak_gib):
    """All 48 layers of 30B's shape on one H200, see docs/memory.md."""
    train = {"batch_size": rows, "gradient_accumulation": 1, "gradient_checkpointing": "full"}
    asked = recipe(quantize=quantize, data={"max_length": tokens}, train=train)
    plan = plan_run(asked, shape("30B-A3B"), card_of_size(140))
    assert plan.measurable_gib == pytest.approx(peak_gib, rel=0.05)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["off", "selective", "full"])
def test_every_model_has_a_plan_whose_parts_add_up(name, mode):
    sizes = shape(name)
    asked = recipe(adapter={} if sizes.moe_layers else {"experts": []}, train={"gradient_checkpointing": mode})
    for device in (processor(), card_of_size(80, count=2)):
        plan = plan_run(asked, sizes, device)
        assert all(part >= 0 for part in astuple(plan.memory.training))
        assert math.fsum(astuple(plan.memory.training)) == plan.memory.training.total <= plan.memory.peak
        assert sum(layer_kinds(sizes).values()) == sizes.layers
        assert plan.is_estimate == bool(sizes.linear_layers)
        assert plan.peak_gib > plan.memory.training.weights / GIB


def test_less_is_kept_more_is_saved():
    sizes, accumulating = shape("30B-A3B"), {"batch_size": 4, "gradient_checkpointing": "off"}
    card = card_of_size(80)

    def peak(**sections):
        return plan_run(recipe(**{"train": accumulating, **sections}), sizes, card).memory.peak

    whole = peak()
    for mode in ("selective", "full"):
        assert peak(train={**accumulating, "gradient_checkpointing": mode}) < whole
    assert peak(train={**accumulating, "optimizer": "adamw_8bit"}) < whole
    assert peak(experts={"select": {"top_fraction": 0.25}}) < whole
    assert peak(quantize={"scheme": "nf4"}) < peak(quantize={"scheme": "fp8"}) < whole
    assert peak(data={"max_length": 8192}) > whole


def test_parameters_of_30b():
    sizes = shape("30B-A3B")
    assert active_parameters(sizes) == sizes.parameters() - 151_936 * 2048 - 120 * 48 * 3 * 2048 * 768
    assert trained(recipe(), sizes).total == 642_514_944
    quarter = trained(recipe(experts={"select": {"top_fraction": 0.25}}), sizes)
    assert (quarter.experts * 4, quarter.experts_per_layer) == (trained(recipe(), sizes).experts, 32)
    assert trained(recipe(experts={"select": {"top_p": 0.5}}), sizes).at_most
    budget = trained(recipe(experts={"select": {"budget": "50M"}}), sizes)
    assert budget.experts == 50_000_000
