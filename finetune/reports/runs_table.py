"""Runs side by side: a table, and a page with their curves over one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from finetune.errors import Problem, UserError
from finetune.reports.page import document, grid_table, section
from finetune.reports.plots import need, plot_together
from finetune.reports.tables import Shown, table

COLUMNS = {
    "name": "run", "model": "model", "state": "state", "date": "started", "steps": "steps", "loss": "loss",
    "eval_before": "eval before", "eval_after": "after", "eval_best": "best", "tokens_per_second": "tokens/s",
    "peak_memory_gib": "peak GiB",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Runs(Shown):
    """Runs with the facts of COLUMNS. metrics: rows of metrics.jsonl of each, by its name."""

    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{len(self.rows)} runs: {', '.join(str(row['name']) for row in self.rows[:8])}" + (
            " ..." if len(self.rows) > 8 else ""
        )

    def sorted_by(self, column: str) -> Runs:
        """Smallest first, unknown ones last. Raises UserError for a column that is none."""
        if column not in COLUMNS:
            raise UserError(Problem("--sort", "is no column", f"take one of {', '.join(COLUMNS)}", column))
        known = sorted((row for row in self.rows if row[column] is not None), key=lambda row: row[column])
        return Runs([*known, *(row for row in self.rows if row[column] is None)], self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"runs": [dict(row) for row in self.rows]}

    def render(self) -> RenderableType:
        """A row for each run; fewer columns where there is no room for all."""
        return _Fitted(self.rows)

    def to_html(self, title: str) -> str:
        """One page without links. Raises UserError when matplotlib is missing."""
        need("matplotlib")
        from finetune.reports.figure import page_colors

        figures = []
        with page_colors():
            for column, name in (("loss", "Training loss, smoothed"), ("eval_loss", "Held-out loss")):
                if any(column in row for rows in self.metrics.values() for row in rows):
                    drawn = plot_together(self.metrics, column).to_svg(name)
                    figures.append(section(name, f'<div class="figure">{drawn}</div>'))
        grid = grid_table(tuple(COLUMNS.values()), [_cells(row) for row in self.rows])
        return document(title, [f"<h1>{len(self.rows)} runs</h1>", grid, *figures])


@dataclass(frozen=True)
class _Fitted:
    """The widest table that fits where it is printed."""

    rows: Sequence[Mapping[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(COLUMNS)
        for left_out in ("model", "peak_memory_gib", "eval_after", "date", "tokens_per_second"):
            if console.measure(self._table(columns), options=options.update(width=1000)).maximum <= options.max_width:
                break
            columns.remove(left_out)
        yield self._table(columns)

    def _table(self, columns: Sequence[str]) -> Table:
        made = table("", *(COLUMNS[name] for name in columns))
        for name, column in zip(columns, made.columns, strict=True):
            column.justify = "left" if name in ("name", "model", "state", "date") else "right"
            column.no_wrap, column.overflow = name != "name", "fold"
        for row in self.rows:
            made.add_row(*(Text(_cell(name, row[name])) for name in columns))
        return made


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_cell(name, row[name]) for name in COLUMNS)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("steps", "tokens_per_second"):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
