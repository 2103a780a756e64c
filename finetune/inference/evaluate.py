"""Exact match and loss of a model on files of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from finetune.adapters.attach import frozen_text, load
from finetune.adapters.frozen import LoadedWeights
from finetune.config.schema import DataFile
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.columns import check_kind
from finetune.data.encode import Encoded, Encoder, Encoding
from finetune.data.prepare_report import unprompted_note
from finetune.data.rows import Row, read_rows
from finetune.data.templates import load_template
from finetune.errors import DataError, Problem
from finetune.models.scoring import RowScore, Score, score_rows

COLUMNS = ("", "rows", "tokens", "loss", "exact match")


@dataclass(frozen=True)
class EvalReport:
    """How well a model answers rows.

    total: all rows.  files: per file.  groups: per value of the field `by`, most rows first; empty without `by`.
    notes: rows that the model's own prompt does not lead to, so that a chat would not show what is measured here.
    frozen: what was used below an adapter, or of a packed model; see `frozen_text`.
    """

    model: str
    template: str
    total: Score
    files: dict[str, Score]
    by: str | None
    groups: dict[str, Score]
    frozen: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return asdict(self)

    def render(self) -> Table:
        """A table for the terminal."""
        title = "\n".join(filter(None, (f"{self.model}, template {self.template}", self.frozen)))
        title = "\n".join((title, *(f"note: {note}" for note in self.notes)))
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for index, row in enumerate(self._rows()):
            table.add_row(*row, style="bold" if index == 0 else None)
        return table

    def _rows(self) -> Iterable[tuple[str, ...]]:
        named = {"all rows": self.total}
        if len(self.files) > 1:
            named |= self.files
        named |= {f"{self.by}: {value}": score for value, score in self.groups.items()}
        for name, score in named.items():
            yield name, f"{score.rows:,}", f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.exact_match:.1%}"

    def _repr_html_(self) -> str:
        """The same table in a notebook."""
        head = "".join(f"<th>{column}</th>" for column in COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows())
        note = f"<caption>{escape(self.frozen)}</caption>" if self.frozen else ""
        return f"<table>{note}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def evaluate(
    path: str | Path,
    data: Sequence[str | Path],
    *,
    template: str = "chat",
    by: str | None = None,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    base_weights: LoadedWeights = "packed",
) -> EvalReport:
    """Score a model folder or an adapter folder on files of rows.

    by: a field of the rows to report by.  limit: rows taken from the head of each file at most.
    dtype, base, base_weights: as for `load`.

    Exact match is the share of rows whose every loss token the model finds most likely: greedy decoding would write
    the same answer. Loss is the mean over all loss tokens, in nats. Both are independent of batch sizes.
    Raises DataError with every bad row, ModelError or AdapterError when the weights cannot be read.
    """
    form = load_template(template)
    check_kind(form, "supervised")
    rows = _read(data, limit)
    if by is not None:
        _check_field(rows, by)
    model, tokenizer = load(path, dtype, base=base, base_weights=base_weights)
    encoded = _encode(rows, Encoder(tokenizer, form, Encoding()))
    scores = score_rows(model, [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    return EvalReport(
        model=str(path),
        template=template,
        total=Score.of(scores),
        files=_grouped((row.source for row in rows), scores),
        by=by,
        groups=_grouped((str(row.fields[by]) for row in rows), scores) if by is not None else {},
        frozen=frozen_text(model),
        notes=_unprompted(rows, encoded),
    )


def _read(data: Sequence[str | Path], limit: int | None) -> list[Row]:
    """The rows of every file, file by file."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for name in map(str, data):
        bad = BadRows()
        try:
            rows += islice(read_rows(DataFile(path=name), bad), limit)
        except DataError as error:
            problems += error.problems
        problems += bad.listing(name)
    if problems:
        raise DataError(*problems)
    return rows


def _check_field(rows: Sequence[Row], by: str) -> None:
    """Every row has the field to report by."""
    lacking = {row.source: row for row in reversed(rows) if by not in row.fields}
    if lacking:
        what = f"has no field {by!r} to report by"
        raise DataError(*(Problem(row.where, what, f"it has {', '.join(row.fields)}") for row in lacking.values()))


def _unprompted(rows: Sequence[Row], encoded: Sequence[Encoded]) -> tuple[str, ...]:
    """Rows whose answer no prompt of the model leads to, by the reason."""
    places: dict[str, list[str]] = {}
    for row, answer in zip(rows, encoded, strict=True):
        if answer.lead is not None and answer.lead.mode is None:
            places.setdefault(answer.lead.why, []).append(row.where)
    return tuple(unprompted_note(why, len(found), found) for why, found in places.items())


def _encode(rows: Sequence[Row], encoder: Encoder) -> list[Encoded]:
    """Tokens and labels of each row."""
    bad = BadRows()
    encoded: list[Encoded] = []
    for row, answer in zip(rows, encoder.encode(rows), strict=True):
        if isinstance(answer, BadRow):
            bad.add(row.where, answer)
        else:
            encoded.append(answer)
    if bad.stop:
        raise DataError(*bad.listing("the rows"))
    return encoded


def _grouped(keys: Iterable[str], scores: Sequence[RowScore]) -> dict[str, Score]:
    """One score per key, most rows first, then by name."""
    groups: dict[str, list[RowScore]] = {}
    for key, score in zip(keys, scores, strict=True):
        groups.setdefault(key, []).append(score)
    return {key: Score.of(groups[key]) for key in sorted(groups, key=lambda key: (-len(groups[key]), key))}
