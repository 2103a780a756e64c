"""Rows without loss, which fill what is left over when rows are shared out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.encode import IGNORED

if TYPE_CHECKING:
    import datasets


def with_blanks(rows: datasets.Dataset, number: int) -> datasets.Dataset:
    """`rows` and at their end `number` of one token that carries no loss.

    rows: with columns input_ids and labels, and seq_lengths where they are packed.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    table = rows.with_format("arrow")[:]
    one = {"input_ids": [[table["input_ids"][0].as_py()[0]]], "labels": [[IGNORED]], "seq_lengths": [[1]]}
    blank = pa.table({name: one[name] for name in table.column_names}, schema=table.schema)
    return datasets.Dataset(pa.concat_tables([table, *[blank] * number]))
