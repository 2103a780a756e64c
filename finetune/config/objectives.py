"""What a run learns from its rows, and which kind of row that takes."""

from __future__ import annotations

from typing import Literal

Objective = Literal["sft", "dpo", "orpo", "kto", "grpo"]
RowKind = Literal["supervised", "preference", "labeled", "prompt"]

ROW_KINDS: dict[Objective, RowKind] = {
    "sft": "supervised",
    "dpo": "preference",
    "orpo": "preference",
    "kto": "labeled",
    "grpo": "prompt",
}
"""Kind of row by objective."""
ROWS_IN_WORDS: dict[RowKind, str] = {
    "supervised": "rows with answers to learn",
    "preference": "preference rows (chosen, rejected)",
    "labeled": "labeled rows (prompt, completion, label)",
    "prompt": "prompts",
}
TEMPLATES: dict[RowKind, str] = {
    "supervised": "chat",
    "preference": "preference",
    "labeled": "labeled",
    "prompt": "prompt",
}
"""Data template of a recipe that names none."""


def objectives_of(kind: RowKind) -> tuple[Objective, ...]:
    """The objectives that rows of a kind serve."""
    return tuple(objective for objective, taken in ROW_KINDS.items() if taken == kind)


def setting_for(kind: RowKind) -> str:
    """Such as `train.objective: dpo or orpo`."""
    return f"train.objective: {' or '.join(objectives_of(kind))}"
