"""Recipes that are right: YAML as people write it, shorthands, overrides, and back to YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import load_recipe, parse_recipe, recipe_to_yaml
from finetune.config.schema import DataFile, Recipe
from finetune.errors import RecipeError
from tests.config.test_broken import GOOD


def test_defaults_are_filled_in_and_the_recipe_is_frozen():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert recipe.adapter.attention == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (recipe.quantize.scheme, recipe.router.train, recipe.train.learning_rate) == ("none", "frozen", 2e-4)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("2", 2.0),
        ("1_000", 1000.0),
        ("0x10", 16.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1.5", 1.5),
    ],
)
def test_numbers_are_read_as_people_write_them(text, value):
    alpha = parse_recipe(GOOD, "r.yaml", f"adapter.alpha={text}").adapter.alpha
    assert alpha == value
    assert type(alpha) is float


@pytest.mark.parametrize(
    "text", ["no", "on", "2026-01-02", "1:30", "1.2.3", "=", "a b", "ünï/代码", "e5", "_1", "v1.0"]
)
def test_text_that_other_yaml_readers_mistake_stays_text(text):
    assert parse_recipe(GOOD.replace("runs/x", text), "r.yaml").output.dir == text


def test_json_is_a_recipe_too():
    text = '{"model": {"path": "a/b"}, "data": {"train": ["c/d"]}, "output": {"dir": "x"}, "train": {"epochs": 1e0}}'
    assert parse_recipe(text, "r.json").data.train == (DataFile(path="c/d"),)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(file, check_files=False) == parse_recipe(GOOD, "r.yaml")


def test_anchors_work_where_they_are_harmless():
    text = (
        GOOD.replace("train: owner/rows", "train: &rows [owner/rows]\n  eval_fraction: 0.1")
        + "experts: &e {}\nrouter: *e\n"
    )
    assert parse_recipe(text, "r.yaml") == parse_recipe(GOOD, "r.yaml", "data.eval_fraction=0.1")


@pytest.mark.parametrize(
    ("written", "files"),
    [
        ("a/b", (DataFile(path="a/b"),)),
        ("[a/b, c/d]", (DataFile(path="a/b"), DataFile(path="c/d"))),
        ("{path: a/b, weight: 2}", (DataFile(path="a/b", weight=2),)),
        ("[a/b, {path: c/d, weight: 0.5}]", (DataFile(path="a/b"), DataFile(path="c/d", weight=0.5))),
    ],
)
def test_file_lists_have_shorthands(written, files):
    assert parse_recipe(GOOD.replace("train: owner/rows", f"train: {written}"), "r.yaml").data.train == files
    assert parse_recipe(GOOD, "r.yaml", f"data.eval={written}").data.eval == files
    assert (
        parse_recipe(GOOD, "r.yaml", f"data.train={written}", "data.train.0.split=test").data.train[0].split == "test"
    )


def test_shorthands_work_in_python_as_well():
    recipe = Recipe.model_validate({"model": {"path": "a"}, "data": {"train": ["b"]}, "output": {"dir": "c"}})
    assert recipe.data.train == (DataFile(path="b"),)


def test_overrides_set_values_lists_sections_and_items():
    text = GOOD.replace("train: owner/rows", "train: [{path: a/b}, c/d]")
    recipe = parse_recipe(
        text,
        "r.yaml",
        "train.steps=50",
        "train.steps=51",
        "adapter.experts=[down_proj]",
        "adapter.attention=[]",
        "data.train.1.weight=2",
        "data.train.0.path=e/f",
        "model.revision='123'",
        "experts.select.top_p=0.5",
        "output={dir: runs/y=z}",
        "train.eval_every=null",
        " train.seed = 7 ",
        "model.dtype=float32",
    )
    assert (recipe.train.steps, recipe.train.seed, recipe.train.eval_every) == (51, 7, None)
    assert (recipe.adapter.experts, recipe.adapter.attention) == (("down_proj",), ())
    assert recipe.data.train == (DataFile(path="e/f"), DataFile(path="c/d", weight=2.0))
    assert recipe.experts.select is not None
    assert (recipe.experts.select.top_p, recipe.output.dir, recipe.model.revision) == (0.5, "runs/y=z", "123")


# override: (where, what, part of the hint)
BAD_OVERRIDES = {
    "train.steps": ("override train.steps", "is not an override", "section.field=value"),
    "=3": ("override =3", "is not an override", "section.field=value"),
    "train..steps=3": ("override train..steps=3", "is not an override", "section.field=value"),
    "train.steps=abc": ("override train.steps=abc", "must be a whole number", "at least 1"),
    "train.steps=": ("override train.steps=", "has no value", "null is spelled out"),
    "train.steps=#4": ("override train.steps=#4", "has no value", "quotes"),
    "train.steps=[1": ("override train.steps=[1", "not closed", "close every ["),
    "train.steps={a: 1, a: 2}": ("override train.steps={a: 1, a: 2}", "is given twice", "keep one"),
    "train.stepps=3": ("override train.stepps=3", "is unknown", "did you mean steps?"),
    "trian.steps=3": ("override trian.steps=3: trian", "is unknown", "did you mean train?"),
    "--train.steps=3": ("override --train.steps=3: --train", "is unknown", "did you mean train?"),
    "train.steps.x=3": ("override train.steps.x=3", "goes below train.steps", "set it whole"),
    "data.train.1.weight=3": ("override data.train.1.weight=3", "no item 1", "items 0 to 0"),
    "data.train.one=3": ("override data.train.one=3", "no item one", "data.train=[...]"),
    "data.eval.0.path=a": ("override data.eval.0.path=a", "not given", "data.eval=VALUE"),
    "adapter.experts.7=down_proj": ("override adapter.experts.7=down_proj", "no item 7", "items 0 to 1"),
    "model=Qwen/Qwen3-0.6B": ("override model=Qwen/Qwen3-0.6B", "must be a section", "{path: Qwen/Qwen3-0.6B}"),
    "data.train={path: a, wieght: 2}": (
        "override data.train={path: a, wieght: 2}: data.train.0.wieght",
        "is unknown",
        "did you mean weight?",
    ),
    "output.dir=\x1b[31mred": ("override output.dir=\\x1b[31mred", "control character", "plain text"),
    "train.eval_every=5": ("override train.eval_every=5", "nothing to evaluate", "data.eval"),
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides_are_named(override):
    where, what, hint = BAD_OVERRIDES[override]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD, "r.yaml", override)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert what in problem.what
    assert hint in problem.hint


def test_an_override_takes_the_blame_from_the_line_it_replaces():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD.replace("rank: 8", "rank: 0"), "r.yaml", "train.steps=0", "adapter.rank=-1")
    assert [problem.where for problem in caught.value.problems] == [
        "override train.steps=0",
        "override adapter.rank=-1",
    ]


def test_a_good_override_repairs_a_bad_line():
    assert parse_recipe(GOOD.replace("rank: 8", "rank: none"), "r.yaml", "adapter.rank=4").adapter.rank == 4


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse_recipe(GOOD, "r.yaml", "output.dir=~/runs/x", "model.path=~/model", "data.train=~/rows.jsonl")
    assert recipe.output.dir == f"{tmp_path}/runs/x"
    assert recipe.model.path == f"{tmp_path}/model"
    assert recipe.data.train[0].path == f"{tmp_path}/rows.jsonl"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.learning_rate=1e-5", "adapter.expert_alpha=0.1", "experts.select.budget=5M", "experts.score=gate"),
        ("output.dir='1e-4'", "model.revision='010'", "data.template='null'", "data.train.0.path='yes'"),
        ("output.dir='~'", "model.revision='2026-01-02'", "data.train.0.path='1_0'", "data.template='0x1f'"),
        ("output.dir='a: b # c'", "model.revision='- x'", "data.train.0.path='é☃ 代'", "data.template='@x'"),
        ("data.train=[{path: a, weight: 1e-7, template: t}, b]", "data.eval=[c]"),
    ],
)
def test_written_recipes_read_back_the_same(overrides):
    recipe = parse_recipe(GOOD, "r.yaml", *overrides)
    text = recipe_to_yaml(recipe)
    assert parse_recipe(text, "again.yaml") == recipe
    assert recipe_to_yaml(parse_recipe(text, "again.yaml")) == text


def test_written_recipes_name_every_field():
    lines = recipe_to_yaml(parse_recipe(GOOD, "r.yaml")).splitlines()
    assert [line for line in lines if not line.startswith((" ", "-"))] == [f"{name}:" for name in Recipe.model_fields]
    assert "  learning_rate: 0.0002" in lines
    assert "  eval_every: null" in lines


def test_load_names_the_file_it_was_given(tmp_path):
    file = tmp_path / "deep" / "r.yaml"
    file.parent.mkdir()
    file.write_text(GOOD.replace("rank: 8", "rank: 0"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert caught.value.problems[0].where == f"{Path(file)}:5: adapter.rank"
