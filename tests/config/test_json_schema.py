"""The JSON Schema for editors says the same as the loader."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from finetune.config.json_schema import recipe_json_schema
from finetune.config.load import parse_recipe, recipe_to_yaml
from finetune.config.recipe_document import RECIPE
from finetune.diagnostics.document import read_document
from tests.config.test_broken import GOOD, LIMITS, NAMES, TYPES

VALIDATOR = jsonschema.Draft202012Validator(recipe_json_schema())
BEYOND_JSON_SCHEMA = {
    "nan", "inf", "overflow", "endless digits", "whole float for a count", "exponent for a count", "blank text",
    "NUL in a path", "escape code", "half a surrogate", "named twice", "no targets", "two rules", "odd budget",
    "key given twice", "section given twice",
}  # fmt: skip


def is_valid(text: str) -> bool:
    return VALIDATOR.is_valid(read_document(text).value)


def test_the_schema_is_a_schema():
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] == "finetune recipe"
    assert list(schema["properties"]) == [
        "model",
        "quantize",
        "adapter",
        "experts",
        "router",
        "data",
        "train",
        "dpo",
        "output",
    ]


def test_every_field_is_described():
    definitions = recipe_json_schema()["$defs"]
    fields = [(name, key) for name, section in definitions.items() for key in section["properties"]]
    assert len(fields) >= 60
    assert [pair for pair in fields if not definitions[pair[0]]["properties"][pair[1]].get("description")] == []


@pytest.mark.parametrize("files", ["a", "[a, b]", "{path: a, weight: 2}", "[{path: a}, b]"])
def test_shorthands_are_in_the_schema(files):
    assert is_valid(GOOD.replace("train: owner/rows", f"train: {files}\n  eval: {files}"))


@pytest.mark.parametrize("files", ["1", "[]", "[1]", "{weight: 2}", "[{path: a, wieght: 2}]"])
def test_what_the_loader_refuses_the_schema_refuses(files):
    assert not is_valid(GOOD.replace("train: owner/rows", f"train: {files}"))


@pytest.mark.parametrize("name", sorted({**TYPES, **LIMITS, **NAMES}.keys() - BEYOND_JSON_SCHEMA))
def test_broken_recipes_are_broken_in_the_editor_too(name):
    assert not is_valid({**TYPES, **LIMITS, **NAMES}[name][0])


def test_recipes_and_written_recipes_are_valid():
    files = sorted(Path("recipes").glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert is_valid(text), file
        assert is_valid(recipe_to_yaml(parse_recipe(text, str(file)))), file


def test_all_fields_walks_the_schema():
    fields = {path for path, _ in RECIPE.all_fields()}
    assert {("model", "path"), ("experts", "select", "top_p"), ("data", "train"), ("output", "dir")} <= fields
