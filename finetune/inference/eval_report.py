"""What `finetune eval` found, for the terminal, notebooks and programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.inference.intervals import RESAMPLES, SEED
from finetune.inference.measured import Compared, Measured
from finetune.models.scoring import Score

COLUMNS = ("", "rows", "tokens", "loss", "exact match")
MEASURED = ("metric", "rows", "value", "95 % interval")
COMPARED = ("metric", "rows", "value", "against", "difference", "95 % interval")


@dataclass(frozen=True)
class Answers:
    """How answers were written.

    max_new_tokens, temperature: as asked for.  rows: answers.  at_limit: of those, how many ran into max_new_tokens.
    tokens: written in all.  modes: thinking `on`, `off` or `only` (the template has one) -> rows asked in it.
    """

    max_new_tokens: int
    temperature: float
    rows: int
    at_limit: int
    tokens: int
    modes: dict[str, int]

    def text(self) -> str:
        """One line."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{self.at_limit:,} of {self.rows:,} answers ran into the limit of {self.max_new_tokens:,} tokens; {how}"


@dataclass(frozen=True)
class Against:
    """The other model on the same rows. total, frozen, answers: as of the first one."""

    model: str
    total: Score
    frozen: str | None
    answers: Answers | None
    compared: tuple[Compared, ...]


@dataclass(frozen=True)
class _Sheet:
    """A table, whose bold rows are the numbers in `bold`."""

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]]
    bold: set[int]
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        made = Table(
            title=Text(self.title, style="table.title") if self.title else None,
            title_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for index, column in enumerate(self.columns):
            made.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
        for index, row in enumerate(self.rows):
            made.add_row(*map(Text, row), style="bold" if index in self.bold else None)
        return made

    def html(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        caption = "<br>".join(escape(text) for text in (*self.title.splitlines(), *self.notes))
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class EvalReport:
    """How well a model answers rows.

    total: all rows under teacher forcing.  files: per file.
    groups: per value of the field `by`, most rows first; empty without `by`.
    notes: rows that the model's own prompt does not lead to, so that a chat would not show what is measured here.
    frozen: what was used below an adapter, or of a packed model; see `frozen_text`.
    answers, metrics: of answers that the model wrote itself; None and empty where it did not.
    against: another model on the same rows.
    """

    model: str
    template: str
    total: Score
    files: dict[str, Score]
    by: str | None
    groups: dict[str, Score]
    frozen: str | None = None
    notes: tuple[str, ...] = ()
    answers: Answers | None = None
    metrics: tuple[Measured, ...] = ()
    against: Against | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return asdict(self)

    def render(self) -> RenderableType:
        """Tables for the terminal."""
        first, *more = self._sheets()
        if not more:
            return first.table()
        parts: list[RenderableType] = [first.table()]
        for sheet in more:
            heading = Text(sheet.title, style="bold")
            parts += ["", heading, replace(sheet, title="").table(), *(Text(note, style="dim") for note in sheet.notes)]
        return Group(*parts)

    def _repr_html_(self) -> str:
        """The same tables in a notebook."""
        return "".join(sheet.html() for sheet in self._sheets())

    def _sheets(self) -> Iterable[_Sheet]:
        title = "\n".join(filter(None, (f"{self.model}, template {self.template}", self.frozen)))
        title = "\n".join((title, *(f"note: {note}" for note in self.notes)))
        yield _Sheet(title, COLUMNS, list(self._rows()), {0})
        means = f"bootstrap ({RESAMPLES:,} resamples, seed {SEED}) for means"
        if self.against is not None:
            sides = (self.model, self.answers), (self.against.model, self.against.answers)
            named = zip(("value", "against"), sides, strict=True)
            notes = [
                f"{name}: {model}" + (f"; {answers.text()}" if answers else "") for name, (model, answers) in named
            ]
            how = f"intervals of the difference, row by row: Bonett-Price for shares, {means}"
            yield from _by_group(self.against.compared, COMPARED, _compared_cells, (*notes, how))
        elif self.answers is not None:
            notes = [self.answers.text(), f"intervals: Wilson for shares, {means}"]
            yield from _by_group(self.metrics, MEASURED, _measured_cells, tuple(notes))

    def _rows(self) -> Iterable[tuple[str, ...]]:
        named = {"all rows": self.total}
        if len(self.files) > 1:
            named |= self.files
        named |= {f"{self.by}: {value}": score for value, score in self.groups.items()}
        for name, score in named.items():
            yield name, f"{score.rows:,}", f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.exact_match:.1%}"


def _by_group(
    found: Sequence[Any], columns: Sequence[str], cells: Callable[[Any], tuple[str, ...]], notes: tuple[str, ...]
) -> Iterable[_Sheet]:
    """One table per group, notes below the last."""
    names = list(dict.fromkeys(each.group for each in found))
    for name in names:
        rows = [(each.metric, f"{each.rows:,}", *cells(each)) for each in found if each.group == name]
        yield _Sheet(name, columns, rows, set(), notes if name == names[-1] else ())


def _measured_cells(found: Measured) -> tuple[str, ...]:
    if found.interval == "wilson":
        return f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}"
    return f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}"


def _compared_cells(found: Compared) -> tuple[str, ...]:
    if found.interval == "bonett-price":
        shares = f"{found.value:.1%}", f"{found.against:.1%}", f"{100 * found.difference:+.1f}"
        return *shares, f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    means = f"{found.value:.4g}", f"{found.against:.4g}", f"{found.difference:+.3g}"
    return *means, f"{found.low:+.3g} to {found.high:+.3g}"
