"""The recipes of the repository: valid, with a header that says what they need, and a comment on every field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.config.load import load_recipe

RECIPES = sorted(Path("recipes").glob("*.yaml"))
HEADER = ("What", "Needs", "First", "Run", "Override", "Next")


def test_all_recipes_are_walked():
    assert {file.stem for file in RECIPES} >= {
        "quickstart",
        "qwen3-0.6b-lora-cpu-or-1gpu",
        "qwen3-30b-a3b-lora-80gb",
        "qwen3-30b-a3b-qlora-24gb",
        "qwen3-235b-a22b-qlora-141gb",
    }
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_is_valid_and_its_header_too(file):
    load_recipe(file, check_files=False)
    header = file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in header)
    assert [word for word in HEADER if any(line.startswith(f"# {word}:") for line in header)] == list(HEADER)
    run = next(line for line in header if line.startswith("# Run:"))
    assert f"finetune train {file}" in run
    overrides = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+=[\w./-]+", "\n".join(header))
    assert overrides
    load_recipe(file, *overrides, check_files=False)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_field_has_a_comment(file):
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 120, f"{file}:{number}"
        field = re.match(r"\s+(?:- )?\w+: *[^\s#]", line)
        assert field is None or " # " in line, f"{file}:{number} has no comment"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_runs_today(file):
    load_recipe(file)
    assert "does not have yet" not in file.read_text(encoding="utf-8")
