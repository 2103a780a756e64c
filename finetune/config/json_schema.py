"""The recipe's JSON Schema, with which editors complete and check recipes."""

from __future__ import annotations

from typing import Any

from finetune.config.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, the shorthands for file lists included."""
    return {"$schema": DIALECT, **Recipe.model_json_schema(), "title": "finetune recipe"}
