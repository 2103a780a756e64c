"""The recipes of the repository: valid, with a header that says what they need, and a comment on every field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from finetune.config.load import load_recipe
from finetune.config.summary import summarize
from finetune.models.live import expert_layers
from finetune.models.skeleton import skeleton
from tests.shrunken import REAL, real_shape

RECIPES = sorted(Path("recipes").glob("*.yaml"))
HEADER = ("What", "Needs", "First", "Run", "Override", "Next")


def test_all_recipes_are_walked():
    assert {file.stem for file in RECIPES} >= {
        "quickstart",
        "qwen3-0.6b-lora-cpu-or-1gpu",
        "qwen3-30b-a3b-lora-80gb",
        "qwen3-30b-a3b-qlora-24gb",
        "qwen3-235b-a22b-qlora-141gb",
        "qwen3-8b-qlora-24gb",
        "qwen3-coder-30b-a3b-lora-80gb",
        "qwen3-next-80b-a3b-qlora-80gb",
        "qwen3-vl-30b-a3b-qlora-24gb",
        "qwen3.6-35b-a3b-lora-80gb",
        "qwen3.6-35b-a3b-qlora-24gb",
    }
    assert len(RECIPES) >= 11


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_is_valid_and_its_header_too(file):
    load_recipe(file, check_files=False)
    header = file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in header)
    assert [word for word in HEADER if any(line.startswith(f"# {word}:") for line in header)] == list(HEADER)
    run = next(line for line in header if line.startswith("# Run:"))
    assert f"finetune train {file.stem}" in run
    overrides = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+=[\w./-]+", "\n".join(header))
    assert overrides
    load_recipe(file, *overrides, check_files=False)


@pytest.mark.parametrize("file", [file for file in RECIPES if file.stem.endswith("gb")], ids=lambda file: file.stem)
def test_header_has_the_memory_of_the_real_model(file, tmp_path):
    """By its config.json, and within the card that the recipe is named for."""
    name = load_recipe(file, check_files=False).model.path
    (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
    facts = summarize(load_recipe(file, f"model.path={tmp_path}", check_files=False))
    frozen, trained = (facts["memory_gib"][key] for key in ("frozen", "trained_with_optimizer"))
    text = " ".join(line.removeprefix("#").strip() for line in file.read_text().splitlines())
    said = re.search(r"weights ([\d.]+) GiB \+ trained state ([\d.]+) GiB .*?about (\d) GiB", text)
    assert said, "the header says no weights and trained state"
    for number, real in zip(said.groups(), (frozen, trained), strict=False):
        assert abs(float(number) - real) <= (0.06 if "." in number else 0.6)
    card = int(re.search(r"(\d+)gb$", file.stem)[1])
    assert frozen + trained + int(said[3]) <= 0.95 * card


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_are_those_of_the_models_that_transformers_builds(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
    model = skeleton(tmp_path, torch.bfloat16)
    shape = real_shape(name)
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    assert len(expert_layers(model)) == shape.moe_layers
    published = float(re.search(r"-([\d.]+)B", name)[1])
    assert abs(shape.parameters() / 1e9 - published) <= 0.03 * published


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
