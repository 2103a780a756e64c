"""The recipe's JSON Schema, with which editors complete and check recipes."""

from __future__ import annotations

from typing import Any

from finetune.config.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, the shorthands for file lists included."""
    schema = Recipe.model_json_schema()
    data = schema["$defs"]["DataSection"]["properties"]
    for name in ("train", "eval"):
        _allow_shorthands(data[name])
    return {"$schema": DIALECT, **schema, "title": "finetune recipe"}


def _allow_shorthands(files: dict[str, Any]) -> None:
    """One file or a list of files, each as a name or a section."""
    file = {"anyOf": [{"type": "string", "minLength": 1}, files.pop("items")]}
    several = {"type": files.pop("type"), "items": file}
    if "minItems" in files:
        several["minItems"] = files.pop("minItems")
    files["anyOf"] = [*file["anyOf"], several]
