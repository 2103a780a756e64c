"""The token sequences that a model reads of rows with feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config.objectives import RowKind
from finetune.data.encode import IGNORED
from finetune.data.feedback.store import COMPLETIONS

if TYPE_CHECKING:
    import datasets


def sequences(rows: Any, kind: RowKind) -> Any:
    """What a model reads of prepared rows of any kind: supervised rows themselves, or `Sequences`."""
    return rows if kind == "supervised" else Sequences(rows, kind)


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


def paired(rows: datasets.Dataset) -> datasets.Dataset:
    """Preference rows with both sequences in one row, the better one first: input_ids, labels, and seq_lengths."""
    import datasets

    def both(row: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = sequences_of(row, "preference")
        lengths = [len(chosen["input_ids"]), len(rejected["input_ids"])]
        return {name: chosen[name] + rejected[name] for name in chosen} | {"seq_lengths": lengths}

    made = [both(row) for row in rows]
    numbers = datasets.List(datasets.Value("int32"))
    names = ("input_ids", "labels", "seq_lengths")
    return datasets.Dataset.from_list(made, features=datasets.Features(dict.fromkeys(names, numbers)))
