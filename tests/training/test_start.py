"""Training on from an adapter: its values and experts, a schedule of its own."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from finetune.config.load import load_recipe, parse_recipe
from finetune.errors import AdapterError, RecipeError, UserError
from finetune.pipeline import resume
from finetune.routing.plan_file import read_plan
from finetune.training.run_folder import RunFolder
from tests.training.runs import EXPERTS, adapter_of, losses_of, resumed_from, run_of, save_moe

CHOSEN = (EXPERTS, "experts.select={top_fraction: 0.34}")
BARELY = ("train.learning_rate=1e-12", "train.save_every=2")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("base") / "moe")


def test_a_run_starts_where_another_ended(moe, tmp_path):
    first = run_of(moe, tmp_path / "first", *CHOSEN)
    begun = f"adapter={EXPERTS.removeprefix('adapter=')[:-1]}, from: {first.path}}}"
    second = run_of(moe, tmp_path / "second", begun, *BARELY)
    before, after = adapter_of(first), adapter_of(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in before.items() if "lora_B" in name)
    assert read_plan(RunFolder(second.path).plan) == read_plan(RunFolder(first.path).plan)
    assert losses_of(second)[0] < losses_of(first)[0]

    shutil.rmtree(first.path)
    again = resumed_from(second, 2, moe, begun, *BARELY)
    assert all(torch.equal(tensor, adapter_of(again)[name]) for name, tensor in after.items())


def test_an_adapter_of_another_kind_is_refused_with_what_differs(moe, tmp_path):
    first = run_of(moe, tmp_path / "first", EXPERTS, "train.steps=1")
    for other, said in {
        "rank: 4, alpha: 16": "lora_alpha: is 8",
        "rank: 2, alpha: 8": "in the file",
    }.items():
        section = f"adapter={{attention: [q_proj], experts: [gate_up_proj, down_proj], {other}, from: {first.path}}}"
        with pytest.raises(AdapterError, match=said):
            run_of(moe, tmp_path / "second", section)
    other_base = save_moe(tmp_path / "other", initializer_range=0.03)
    begun = f"adapter={EXPERTS.removeprefix('adapter=')[:-1]}, from: {first.path}}}"
    with pytest.raises(AdapterError, match="was trained on another model"):
        run_of(other_base, tmp_path / "third", begun)


def test_what_is_no_adapter_is_refused_by_check(tmp_path):
    wrong = (f"adapter.from={tmp_path}", "experts.select={top_fraction: 0.5}")
    with pytest.raises(RecipeError) as refused:
        load_recipe("recipes/quickstart.yaml", *wrong)
    assert "holds no adapter" in str(refused.value)
    assert "so is experts.select" in str(refused.value)


def test_a_recipe_with_a_start_survives_writing(tmp_path):
    from finetune.config.load import recipe_to_yaml

    recipe = load_recipe("recipes/quickstart.yaml", "adapter.from=somewhere", "experts.select=null", check_files=False)
    assert recipe.adapter.start == "somewhere"
    assert parse_recipe(recipe_to_yaml(recipe), "again") == recipe


def test_more_steps_are_those_of_a_run_that_was_meant_to_take_them(moe, tmp_path):
    constant = ("train.save_every=2", "data.shuffle=false", *CHOSEN)
    whole = run_of(moe, tmp_path / "whole", *constant, "train.steps=6")
    first = run_of(moe, tmp_path / "first", *constant)
    with pytest.raises(UserError, match="takes more steps"):
        resume(first.path, "train.steps=6", console=Console(quiet=True))
    wrong = ("train.steps=3", "train.learning_rate=0.5", f"output.dir={tmp_path / 'more'}")
    with pytest.raises(UserError) as refused:
        resume(first.path, *wrong, console=Console(quiet=True))
    assert "not above the 4 steps" in str(refused.value)
    assert "train.learning_rate" in str(refused.value)
    more = resume(first.path, "train.steps=6", f"output.dir={tmp_path / 'more'}", console=Console(quiet=True))
    assert losses_of(more) == losses_of(whole)
    assert all(torch.equal(tensor, adapter_of(more)[name]) for name, tensor in adapter_of(whole).items())
    assert losses_of(first) == losses_of(whole)[:4]
    provenance = json.loads((more.path / "provenance.json").read_text())
    assert provenance["parent"] == {"run": "first", "step": 4}
    again = resume(more.path, console=Console(quiet=True))
    assert losses_of(again) == losses_of(whole)
