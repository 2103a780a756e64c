"""How many steps a recipe makes of its rows."""

import pytest

from finetune.config.load import parse_recipe
from finetune.config.steps import Steps, warmup_steps
from finetune.config.summary import summarize

TEXT = """
model: {path: Qwen/Qwen3-30B-A3B}
data: {train: owner/rows}
output: {dir: runs/x}
"""


def recipe(*overrides: str):
    return parse_recipe(TEXT, "test.yaml", *overrides)


def test_warm_up_leaves_a_step_at_the_peak():
    train = recipe("train.warmup=0.9").train
    assert [warmup_steps(train, total) for total in (1, 2, 100)] == [0, 1, 90]


def test_blocks_steps_and_warm_up_are_told():
    steps = Steps.of(recipe(), 9_600)
    assert steps.text() == "steps: 1,200, of 8 blocks each; 36 of them warm up; 1 epoch of 9,600 blocks"
    assert steps.warnings() == []
    steps = Steps.of(recipe("data.packing=false", "train.steps=100", "train.batch_size=2"), 3_200, devices=2)
    assert steps.text() == "steps: 100, of 32 rows each; 3 of them warm up; 1 epoch of 3,200 rows"


def test_few_steps_are_a_warning_with_the_remedy():
    steps = Steps.of(recipe(), 12)
    assert (steps.total, steps.warmup) == (2, 1)
    (warning,) = steps.warnings()
    assert "2 steps hardly move" in warning
    assert "train.epochs: 14, a lower train.gradient_accumulation, a lower data.max_length, or add rows" in warning
    assert Steps.of(recipe("train.epochs=14.0"), 12).total >= 20
    assert Steps.of(recipe("train.epochs=14.0"), 12).warnings() == []


@pytest.mark.parametrize(("steps", "warned"), [(19, True), (20, False)])
def test_check_tells_them_where_the_recipe_does(steps, warned):
    facts = summarize(recipe(f"train.steps={steps}", "train.warmup=0.5"))
    assert facts["warmup_steps"] == 10
    assert any("raise train.steps" in text for text in facts["warnings"]) == warned
    assert summarize(recipe())["warmup_steps"] is None
