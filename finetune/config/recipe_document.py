"""The recipe as `diagnostics` reads it."""

from __future__ import annotations

from finetune.config.other_tools import ABSENT, FIELDS, VALUES
from finetune.config.schema import Recipe
from finetune.diagnostics.schema import Schema

RECIPE = Schema(
    Recipe,
    noun="a recipe",
    other_names=FIELDS,
    absent=ABSENT,
    other_values=VALUES,
    example_override="train.steps=50",
    how_to_start="`finetune init` writes one to start from",
)
