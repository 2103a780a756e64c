"""The notebook API takes what people have: paths, dicts, recipes, runs; and its errors speak Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console

import finetune as ft
from finetune.errors import Problem, in_python
from tests.routing.profiles import profile_of
from tests.training.runs import BASE, recipe_of, save_moe

HELD_OUT = "examples/data/secret-code-heldout.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run of a recipe that is a file."""
    folder = tmp_path_factory.mktemp("run")
    sections = recipe_of(model, folder / "run", "train.steps=2").model_dump(mode="json")
    (folder / "r.yaml").write_text(yaml.safe_dump(sections))
    return ft.train(folder / "r.yaml", console=Console(quiet=True))


def test_a_run_is_where_its_adapter_is(run, model, tmp_path, capsys):
    adapted, tokenizer = ft.load(run.path)
    assert adapted.peft_config
    assert len(tokenizer) > 0
    assert ft.evaluate(run.path, HELD_OUT, limit=3).total == ft.evaluate(run.adapter, [HELD_OUT], limit=3).total
    reply = ft.chat(run.path, "encode: c a t", max_new_tokens=4, temperature=0.0)
    assert isinstance(reply, str)
    assert capsys.readouterr().out == ""
    ft.merge(run.path, tmp_path / "merged", base=model, console=Console(quiet=True))
    assert ft.export(run.path, tmp_path / "peft", "peft", base=model, console=Console(quiet=True)).files
    assert ft.resume(run.path, console=Console(quiet=True)).summary["steps"] == 2


def test_a_run_that_did_not_end_says_so(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ft.UserError, match="is a run without an adapter"):
        ft.load(tmp_path)


def test_recipes_are_paths_dicts_and_recipes(model, tmp_path):
    made = recipe_of(model, tmp_path / "run")
    sections = {"model": {"path": Path(model)}, "data": {"train": [HELD_OUT]}, "output": {"dir": tmp_path / "run"}}
    assert ft.load_recipe(sections).model.path == str(model)
    assert ft.load_recipe(made, "train.steps=7").train.steps == 7
    assert ft.load_recipe(made) == made
    rows, _ = ft.prepare({**made.model_dump(), "data": {"train": HELD_OUT, "packing": False}})
    assert len(rows.train) > 0
    with pytest.raises(ft.UserError) as caught:
        ft.train({**sections, "train": {"steps": 0, "lr": 1}})
    told = str(caught.value)
    assert "recipe: train.steps: must be at least 1, got 0" in told
    assert "did you mean train.learning_rate?" in told


def test_changed_recipes_are_checked(model, tmp_path):
    made = recipe_of(model, tmp_path / "run")
    with pytest.raises(ft.UserError, match="steps: must be at least 1, got 0"):
        made.train.model_copy(update={"steps": 0})
    assert made.train.model_copy(update={"steps": 3}).steps == 3
    clashing = made.model_copy(update={"train": made.train.model_copy(update={"precision": "bf16"})})
    clashing = clashing.model_copy(update={"model": made.model.model_copy(update={"dtype": "float16"})})
    with pytest.raises(ft.UserError, match=r"is float16, but train\.precision is bf16"):
        ft.train(clashing)


def test_select_takes_a_dict_and_tells_what_is_wrong_with_it():
    profile = profile_of([[8, 4, 2, 1], [1, 2, 4, 8]])
    plan = ft.select(profile, {"select": {"top_fraction": 0.5}})
    assert plan.experts_by_layer == {0: (0, 1), 1: (2, 3)}
    with pytest.raises(ft.UserError, match="did you mean top_fraction"):
        ft.select(profile, {"select": {"top_fractoin": 0.5}})
    with pytest.raises(ft.UserError, match="needs the rank"):
        ft.select(profile, {"select": {"top_fraction": 0.5}, "hot": {"rank": 8, "top_fraction": 0.25}})


def test_errors_in_python_speak_python(run):
    with pytest.raises(ft.UserError) as caught:
        ft.train(run.path / "recipe.yaml")
    assert "resume=True continues it, overwrite=True starts anew" in str(caught.value)
    assert "--resume continues it" in caught.value.on_command_line()
    problem = Problem(
        "--base", "is odd", "use --dtype bf16 or fp32, `finetune merge A --output B`, or leave --onto out"
    )
    assert in_python(str(problem)) == (
        'error: base: is odd\nhint: use dtype="bf16" or fp32, `finetune merge A --output B`, or leave onto out'
    )
    assert in_python("merge it: finetune merge A --output B, then --to gguf") == (
        'merge it: finetune merge A --output B, then to="gguf"'
    )


def test_the_embedded_model_answers():
    assert ft.chat(BASE, "What is 12 + 7?", max_new_tokens=4, temperature=0.0)
