"""What `finetune eval` found, for the terminal, notebooks and programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.inference.intervals import RESAMPLES, SEED
from finetune.inference.measured import Compared, Measured
from finetune.models.scoring import Score

COLUMNS = ("", "rows", "tokens", "loss", "exact match")
MEASURED = ("generated answers", "rows", "value", "95 % interval")
COMPARED = ("side by side", "rows", "value", "against", "difference", "95 % interval")


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
        made = Table(title=Text(self.title, style="italic"), title_justify="left", box=None, padding=(0, 2, 0, 0))
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
            parts += ["", sheet.table(), *(Text(note, style="dim") for note in sheet.notes)]
        return Group(*parts)

    def _repr_html_(self) -> str:
        """The same tables in a notebook."""
        return "".join(sheet.html() for sheet in self._sheets())

    def _sheets(self) -> Iterable[_Sheet]:
        title = "\n".join(filter(None, (f"{self.model}, template {self.template}", self.frozen)))
        title = "\n".join((title, *(f"note: {note}" for note in self.notes)))
        yield _Sheet(title, COLUMNS, list(self._rows()), {0})
        if self.answers is not None and self.against is None:
            how = f"intervals: Wilson for shares, bootstrap ({RESAMPLES:,} resamples, seed {SEED}) for means"
            rows, bold = _grouped(self.metrics, _measured_cells)
            yield _Sheet("", MEASURED, rows, bold, (self.answers.text(), how))
        if self.against is not None:
            how = (
                "intervals of the difference, row by row: Bonett-Price for shares, "
                f"bootstrap ({RESAMPLES:,} resamples, seed {SEED}) for means"
            )
            limits = [
                f"{name}: {answers.text()}"
                for name, answers in (("value", self.answers), ("against", self.against.answers))
                if answers is not None
            ]
            rows, bold = _grouped(self.against.compared, _compared_cells)
            title = f"value: {self.model}\nagainst: {self.against.model}"
            yield _Sheet(title, COMPARED, rows, bold, (*limits, how))

    def _rows(self) -> Iterable[tuple[str, ...]]:
        named = {"all rows": self.total}
        if len(self.files) > 1:
            named |= self.files
        named |= {f"{self.by}: {value}": score for value, score in self.groups.items()}
        for name, score in named.items():
            yield name, f"{score.rows:,}", f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.exact_match:.1%}"


def _grouped(found: Sequence[Any], cells: Any) -> tuple[list[tuple[str, ...]], set[int]]:
    """Rows below the name of their group, and where those names are."""
    rows: list[tuple[str, ...]] = []
    names: set[int] = set()
    group = None
    for each in found:
        if each.group != group:
            group = each.group
            names.add(len(rows))
            rows.append((each.group,))
        rows.append((f"  {each.metric}", f"{each.rows:,}", *cells(each)))
    width = max(map(len, rows), default=0)
    return [(*row, *("",) * (width - len(row))) for row in rows], names


def _measured_cells(found: Measured) -> tuple[str, ...]:
    if found.interval == "wilson":
        return f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}"
    return f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}"


def _compared_cells(found: Compared) -> tuple[str, ...]:
    if found.interval == "bonett-price":
        shares = f"{found.value:.1%}", f"{found.against:.1%}", f"{100 * found.difference:+.1f}"
        return *shares, f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    means = f"{found.value:.4g}", f"{found.against:.4g}", f"{found.difference:+.4g}"
    return *means, f"{found.low:+.4g} to {found.high:+.4g}"
