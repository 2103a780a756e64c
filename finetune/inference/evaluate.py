"""How well models answer files of rows: how likely they find the answers there, and how good their own are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.attach import load
from finetune.adapters.files import adapter_folder
from finetune.adapters.frozen import LoadedWeights
from finetune.adapters.stock_config import ADAPTER_CONFIG
from finetune.config.schema import DataFile
from finetune.data.bad_rows import BadRows
from finetune.data.columns import check_kind
from finetune.data.encode import Encoded
from finetune.data.prepare_report import unprompted_note
from finetune.data.rows import Row, read_rows
from finetune.data.templates import DataTemplate, TextTemplate, load_template
from finetune.errors import AdapterError, DataError, Problem
from finetune.inference.answers import Progress, Sat, Sitting, Writing, write_rows
from finetune.inference.eval_report import Against, EvalReport
from finetune.inference.measured import Groups, compare, measure
from finetune.inference.metrics import Metric, metrics
from finetune.models.files import check_target_file
from finetune.models.scoring import RowScore, Score

BASE = "base"


@dataclass(frozen=True)
class Source:
    """A model folder, or an adapter's or a run's, and how it is loaded; see `load`."""

    path: str | Path
    dtype: torch.dtype | None = None
    base: str | Path | None = None
    base_weights: LoadedWeights = "packed"

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return load(self.path, self.dtype, base=self.base, base_weights=self.base_weights)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder has an adapter rather than a model."""
        return (adapter_folder(self.path) / ADAPTER_CONFIG).is_file()

    def other(self, path: str | Path) -> Source:
        """Another one, loaded the same way."""
        source = replace(self, path=path)
        return source if source.is_adapter else replace(source, base=None)


def evaluate(
    source: Source,
    data: Sequence[str | Path],
    *,
    template: str = "chat",
    by: str | None = None,
    limit: int | None = None,
    writing: Writing | None = None,
    against: str | Path | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Score a model, an adapter or a run on files of rows.

    by: a field of the rows to report by.  limit: rows taken from the head of each file at most.
    writing: let the model write answers too; it is asked for the last trained answer of every row.
    against: `base`, which is the same model without its adapter, or another model, adapter or run.
    progress: gets the answers written and all of them.

    Exact match of `total` is the share of rows whose every loss token the model finds most likely: greedy decoding
    would write the same answer. Loss is the mean over all loss tokens, in nats. Both are independent of batch sizes.
    Raises DataError with every bad row, ModelError or AdapterError when the weights cannot be read.
    """
    form = load_template(template)
    check_kind(form, "supervised")
    judges = _judges(writing, form, template)
    if against == BASE and not source.is_adapter:
        hint = "give the folder of an adapter or a run, or name another model"
        raise AdapterError(Problem("--against base", "needs an adapter to switch off", hint, str(source.path)))
    rows = _read(data, limit)
    if by is not None:
        _check_field(rows, by)
    sat, other, name = _sit(source, against, Sitting(rows, form, writing, judges, progress))
    if writing is not None and writing.output is not None:
        write_rows(writing.output, rows, sat, other)
    groups = _groups(rows, by)
    beside = None
    if other is not None:
        compared = tuple(compare(sat.columns, other.columns, groups))
        beside = Against(name, Score.of(other.scores), other.frozen, other.answers(writing), compared)
    return EvalReport(
        model=str(source.path),
        template=template,
        total=Score.of(sat.scores),
        files=_scores((row.source for row in rows), sat.scores),
        by=by,
        groups=_scores((str(row.fields[by]) for row in rows), sat.scores) if by is not None else {},
        frozen=sat.frozen,
        notes=_unprompted(rows, sat.encoded),
        answers=sat.answers(writing),
        metrics=tuple(measure(sat.columns, groups)) if writing is not None else (),
        against=beside,
    )


def _judges(writing: Writing | None, form: DataTemplate, template: str) -> list[Metric]:
    """What judges written answers; errors come before a model is loaded."""
    if writing is None:
        return []
    if isinstance(form, TextTemplate):
        hint = "use a template with a question and an answer; without --generate the loss is reported"
        raise DataError(Problem(f"template {template}", "makes plain text, which asks for no answer", hint))
    if writing.output is not None:
        check_target_file(writing.output)
    return metrics(writing.metrics, writing.tolerance)


def _sit(source: Source, against: str | Path | None, sitting: Sitting) -> tuple[Sat, Sat | None, str]:
    """What the model makes of the rows, what the other one does, and that one's name; one in memory at a time."""
    model, tokenizer = source.load()
    sat = sitting.of(model, tokenizer)
    if against is None:
        return sat, None, ""
    if against == BASE:
        with model.disable_adapter():
            return sat, sitting.of(model, tokenizer), f"{model.get_base_model().name_or_path}, the base"
    del model, tokenizer
    return sat, sitting.of(*source.other(against).load()), str(against)


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


def _groups(rows: Sequence[Row], by: str | None) -> Groups:
    """All rows, those of each file where there are several, and those of each value of a field."""
    files = _by_key(row.source for row in rows)
    groups: Groups = {"all rows": list(range(len(rows)))}
    if len(files) > 1:
        groups |= files
    if by is not None:
        groups |= {f"{by}: {value}": found for value, found in _by_key(str(row.fields[by]) for row in rows).items()}
    return groups


def _scores(keys: Iterable[str], scores: Sequence[RowScore]) -> dict[str, Score]:
    """One score per key."""
    return {key: Score.of([scores[index] for index in found]) for key, found in _by_key(keys).items()}


def _by_key(keys: Iterable[str]) -> Groups:
    """Indices per key, most first, then by name."""
    groups: Groups = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return {key: groups[key] for key in sorted(groups, key=lambda key: (-len(groups[key]), key))}
