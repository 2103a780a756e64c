"""`finetune init` and `finetune recipes`: recipes to start from, wherever one is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.cli.completion import complete_card, complete_override, complete_recipe
from finetune.config.load import load_recipe
from finetune.config.package_files import package_folder, recipe_names, with_examples
from finetune.errors import UserError
from finetune.planning.device import card_named
from finetune.planning.plan import plan_run
from tests.planning.shapes import CONFIGS, shape

ROW = {"messages": [{"role": "user", "content": "What is 17 + 25?"}, {"role": "assistant", "content": "42"}]}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(name: str) -> str:
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(CONFIGS[name]))
    return name


def rows(name: str, row: dict, count: int = 2000) -> str:
    Path(name).write_text((json.dumps(row) + "\n") * count)
    return name


def test_defaults_are_the_embedded_model_and_its_rows(capsys):
    assert main(["init", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "fits" in out
    assert "next: finetune check recipe.yaml" in out
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.path == with_examples("examples/tiny-qwen3-moe")
    assert recipe.adapter.rank_of_experts == recipe.adapter.rank // 4
    text = Path("recipe.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120
    fields = re.findall(r"^ +(?:- )?\w+: *[^\s#].*$", text, re.MULTILINE)
    assert len(fields) > 20
    assert all(" # " in field for field in fields)
    assert main(["check", "recipe.yaml"]) == 0


@pytest.mark.parametrize(
    ("name", "card", "scheme", "checkpointing"),
    [
        ("0.6B", "h100", "none", "off"),
        ("8B", "rtx-4090", "none", "full"),
        ("8B", "t4", "nf4", "selective"),
        ("30B-A3B", "h200", "none", "off"),
        ("30B-A3B", "h100", "none", "selective"),
        ("30B-A3B", "rtx-4090", "nf4", "full"),
        ("235B-A22B", "h200", "nf4", "full"),
    ],
)
def test_storage_and_recomputation_follow_from_the_card(name, card, scheme, checkpointing):
    data = rows("mine.jsonl", ROW, 40_000)
    assert main(["init", "--model", model(name), "--data", data, "--gpu", card]) == 0
    recipe = load_recipe("recipe.yaml")
    assert (recipe.quantize.scheme, recipe.train.gradient_checkpointing) == (scheme, checkpointing)
    assert plan_run(recipe, shape(name), card_named(card)).verdict == "fits"
    assert recipe.train.learning_rate == (1e-4 if name.startswith("235") else 2e-4)
    if recipe.adapter.experts:
        assert recipe.adapter.rank_of_experts == 4
    else:
        assert recipe.adapter.mlp


def test_what_fits_nowhere_is_written_and_said(capsys):
    assert main(["init", "--model", model("32B"), "--gpu-gib", "8"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert load_recipe("recipe.yaml").quantize.scheme == "nf4"


def test_packed_rows_of_linear_attention_are_never_proposed():
    assert main(["init", "--model", model("qwen3_next"), "--gpu", "h100"]) == 0
    assert not load_recipe("recipe.yaml").data.packing


@pytest.mark.parametrize(
    ("row", "template", "columns"),
    [
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "sharegpt", None),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "instruct", None),
        ({"text": "once upon a time"}, "text", None),
        ({"question": "1 + 2", "answer": "3"}, "instruct", {"instruction": "question", "output": "answer"}),
    ],
)
def test_the_shape_of_rows_is_found(row, template, columns):
    assert main(["init", "--data", rows("mine.jsonl", row)]) == 0
    data = load_recipe("recipe.yaml").data
    assert data.template == template
    assert (data.columns.given() if data.columns else None) == columns
    assert data.over_long == ("split" if template == "text" else "error")


def test_blocks_hold_the_longest_row():
    answer = {"role": "assistant", "content": "word " * 1200}
    assert main(["init", "--data", rows("mine.jsonl", {"messages": [ROW["messages"][0], answer]}, 20)]) == 0
    assert load_recipe("recipe.yaml").data.max_length == 2048


def test_mistakes_write_nothing(capsys):
    Path("recipe.yaml").write_text("mine")
    assert main(["init", "--yes"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"
    assert main(["init", "--yes", "--overwrite"]) == 0
    assert main(["init", "-o", "a.yaml", "--data", "nowhere.jsonl"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["init", "-o", "a.yaml", "--data", rows("odd.jsonl", {"a": 1, "b": 2})]) == 2
    assert "finetune template new" in capsys.readouterr().err
    assert main(["init", "-o", "a.yaml", "--gpu", "h1000"]) == 2
    assert not Path("a.yaml").exists()


def test_a_terminal_is_asked(monkeypatch, capsys):
    answers = iter([model("8B"), rows("mine.jsonl", ROW), "h10", "24 GB"])
    monkeypatch.setattr("finetune.cli.first_recipe.is_terminal", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    assert main(["init"]) == 0
    assert "did you mean h100?" in capsys.readouterr().err
    recipe = load_recipe("recipe.yaml")
    assert recipe.data.train[0].path == "mine.jsonl"
    assert "(a GPU with 24 GiB)" in Path("recipe.yaml").read_text()


def test_recipes_are_listed_printed_and_known_by_name(capsys):
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [entry["name"] for entry in listed] == list(recipe_names())
    assert len(listed) >= 11
    assert all(entry["model"] and entry["card"] and "LoRA on" in entry["method"] for entry in listed)
    assert main(["recipes"]) == 0
    assert all(entry["name"] in capsys.readouterr().out for entry in listed[:1])
    assert main(["recipes", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert text == (package_folder("recipes") / "quickstart.yaml").read_text(encoding="utf-8")
    for entry in listed:
        load_recipe(entry["name"])  # with the package's examples, from an empty folder
    assert main(["recipes", "quickstrat"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_a_file_of_that_name_comes_first():
    Path("quickstart").write_text("model: {path: no/where/at/all}\n")
    with pytest.raises(UserError, match="quickstart"):
        load_recipe("quickstart")


def test_examples_are_the_package_s_where_there_are_none():
    assert with_examples("examples/data/replay.jsonl") == str(package_folder("examples") / "data/replay.jsonl")
    for path in (
        "examples/data/nothing.jsonl",
        "examples/../pyproject.toml",
        "example",
        "data/replay.jsonl",
        "examples/\0",
    ):
        assert with_examples(path) == path
    Path("examples/data").mkdir(parents=True)
    Path("examples/data/replay.jsonl").write_text("{}\n")
    assert with_examples("examples/data/replay.jsonl") == "examples/data/replay.jsonl"


def test_a_shell_is_offered_what_there_is(monkeypatch, capsys):
    Path("mine.yaml").touch()
    Path("more").mkdir()
    Path("other.txt").touch()
    assert complete_recipe("m") == ["more/", "mine.yaml"]
    assert "qwen3-8b-qlora-24gb" in complete_recipe("qwen3-8")
    assert ("train.learning_rate=", "peak learning rate") in complete_override("train.le")
    assert complete_override("quantize.scheme=n") == [("quantize.scheme=none", ""), ("quantize.scheme=nf4", "")]
    assert complete_card("h") == ["h200", "h100"]
    monkeypatch.setenv("_FINETUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "finetune train quick")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["quickstart"]
