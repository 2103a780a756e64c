"""The token sequences that a model reads of rows with feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.config.objectives import RowKind
from finetune.data.encode import IGNORED
from finetune.data.feedback.store import COMPLETIONS


@dataclass(frozen=True)
class Sequences:
    """Every completion of every row behind its prompt, or the prompt alone, as `input_ids` and `labels`.

    rows: a data set of `prepare_feedback`.
    """

    rows: Any
    kind: RowKind

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for row in self.rows:
            yield from sequences_of(row, self.kind)


def sequences_of(row: dict[str, Any], kind: RowKind) -> list[dict[str, list[int]]]:
    """Those of one row, in the order of its completions."""
    prompt = row["prompt_ids"]
    masked = [IGNORED] * len(prompt)
    if kind == "prompt":
        return [{"input_ids": prompt, "labels": masked}]
    return [
        {"input_ids": prompt + row[f"{name}_ids"], "labels": masked + row[f"{name}_labels"]}
        for name in COMPLETIONS[kind]
    ]
