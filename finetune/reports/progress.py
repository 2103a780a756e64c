"""Progress of runs, reads and writes: a live line in a terminal, HTML in a notebook.

A pipe gets a line per logged step of a run, and one for a wait without a count, once it takes long.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from html import escape
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from finetune.reports.console import open_console

PATIENCE_S = 2.0
"""A wait that takes longer is printed where no live line shows it."""


class Bar(Protocol):
    """What shows how far a thing is."""

    def update(self, done: int, total: int | None, text: str) -> None:
        """`done` of `total` (None: nobody knows) is done; `text` says what or how."""

    def close(self) -> None:
        """No more updates."""


class TrainingProgress:
    """Call it with every row of metrics, between `start` and `close`.

    A terminal and a notebook have one live line; anything else gets a plain line per logged step and evaluation.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or open_console(stderr=True)
        self._bar: Bar | None = None
        self._first_step = ExitStack()
        self._total, self._done = 0, 0
        self._seen: dict[str, Any] = {}
        self._timed: tuple[int, float] | None = None

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """See `waiting`."""
        return waiting(self._console, what)

    def start(self, total_steps: int, first: str = "", done: int = 0) -> None:
        """Draw the bar, behind the first step where that does something else beside training, which `first` says.

        done: steps of the run that were taken before.
        """
        self._total, self._done = total_steps, done
        if first:
            self._first_step.enter_context(waiting(self._console, first))
        else:
            self._draw()

    def _draw(self) -> None:
        self._first_step.close()  # a terminal has one live line
        columns = TextColumn("training"), BarColumn(16), MofNCompleteColumn(), _rest_of_the_line()
        self._bar = _bar(self._console, *columns)
        self._bar.update(self._done, self._total, "")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._first_step.close()
        if self._bar is not None:
            self._bar.close()

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row of metrics.jsonl."""
        for warning in row.get("warnings", ()):
            self._console.print(f"warning: step {row['step']}: {warning}", style="yellow", soft_wrap=True)
        if self._bar is None and "seconds_to_first_step" in row:
            self._draw()
        row = row | self._left(row)
        self._seen |= row
        if isinstance(self._bar, _Silence) and ("loss" in row or "eval_loss" in row):
            step = f"step {row['step']:,}/{self._total:,}"
            self._console.print(f"{step} · {describe(row, every=True)}", markup=False, highlight=False, soft_wrap=True)
        elif self._bar is not None:
            self._bar.update(row["step"], self._total, describe(self._seen))

    def _left(self, row: dict[str, Any]) -> dict[str, float]:
        """The seconds that are left, by the speed since the first row: its step may have compiled something."""
        if "elapsed_s" not in row:
            return {}
        step, elapsed_s = self._timed or (self._done, 0.0)
        self._timed = self._timed or (row["step"], row["elapsed_s"])
        steps = row["step"] - step
        if steps < 1 or (steps == 1 and not elapsed_s):
            return {}
        return {"left_s": (row["elapsed_s"] - elapsed_s) / steps * (self._total - row["step"])}


def describe(row: dict[str, Any], *, every: bool = False) -> str:
    """`loss 1.2345 · 0:12:34 left · eval 0.9876 (exact 93.0 %) · ...`, as far as known, what matters most first.

    every: also what hardly changes from row to row.
    """
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "left_s" in row:
        parts.append(f"{timedelta(seconds=round(row['left_s']))} left")
    if "eval_loss" in row:
        parts.append(f"eval {row['eval_loss']:.4f}" + _answered(row))
    if "rewards/margins" in row:
        parts.append(f"margin {row['rewards/margins']:.3f}")
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if every and row.get("learning_rate") is not None:
        parts.append(f"rate {row['learning_rate']:.2e}")
    if every and "peak_memory_gib" in row:
        parts.append(f"{row['peak_memory_gib']:.2f} GiB")
    if "router_overlap" in row:
        parts.append(f"routing {100 * row['router_overlap']:.0f} % as base")
    return " · ".join(parts)


def _answered(row: dict[str, Any]) -> str:
    """How held-out rows fared, in parentheses."""
    if "eval_exact_match" in row:
        return f" (exact {100 * row['eval_exact_match']:.1f} %)"
    if "eval_preference_accuracy" in row:
        return f" (prefers chosen {100 * row['eval_preference_accuracy']:.1f} %)"
    return ""


def _rest_of_the_line() -> TextColumn:
    """Text that takes no space from what stands before it."""
    return TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A line with the seconds that `what` takes; in a pipe a plain one, unless it is over soon."""
    bar = _bar(console, SpinnerColumn(), TimeElapsedColumn(), _rest_of_the_line(), transient=True)
    bar.update(0, None, what)
    late = threading.Timer(PATIENCE_S, lambda: console.print(what, highlight=False))
    late.daemon = True
    if isinstance(bar, _Silence) and not console.quiet:
        late.start()
    try:
        yield
    finally:
        late.cancel()
        bar.close()


@contextmanager
def rows_read(console: Console) -> Iterator[Callable[[str, int], None]]:
    """A line that counts; call what it gives with a file's name and the rows read so far."""
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} rows"), _rest_of_the_line()
    bar = _bar(console, *columns, transient=True)
    try:
        yield lambda name, rows: bar.update(rows, None, f"reading {name}")
    finally:
        bar.close()


@contextmanager
def bytes_done(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of bytes; call what it gives with a file's name, the bytes done and the bytes in all."""
    bar = _bar(console, BarColumn(24), DownloadColumn(), TimeRemainingColumn(), _rest_of_the_line(), transient=True)
    try:
        yield lambda name, done, total: bar.update(done, total, f"{what} {name}")
    finally:
        bar.close()


@contextmanager
def rows_done(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of rows; call what it gives with the rows done and the rows in all."""
    bar = _bar(console, BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), _rest_of_the_line(), transient=True)
    try:
        yield lambda done, total: bar.update(done, total, f"{what} rows")
    finally:
        bar.close()


def _bar(console: Console, *columns: ProgressColumn, transient: bool = False) -> Bar:
    """The bar that fits where we run; a transient one leaves no trace."""
    if console.quiet:
        return _Silence()
    if _in_notebook():
        return _NotebookBar(transient)
    if not console.is_terminal:
        return _Silence()
    return _TerminalBar(Progress(*columns, console=console, transient=transient, expand=_expands(columns)))


def _expands(columns: Sequence[ProgressColumn]) -> bool:
    """Whether a column takes what the others leave of the line."""
    return any(column.get_table_column().ratio for column in columns)


class _Silence:
    def update(self, done: int, total: int | None, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _TerminalBar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, text="")
        self._progress.start()

    def update(self, done: int, total: int | None, text: str) -> None:
        self._progress.update(self._task, completed=done, total=total, text=text)

    def close(self) -> None:
        self._progress.stop()


class _NotebookBar:
    def __init__(self, transient: bool) -> None:
        from IPython.display import HTML, display

        self._html, self._transient = HTML, transient
        self._handle: Any = display(HTML(""), display_id=True)

    def update(self, done: int, total: int | None, text: str) -> None:
        place = f"{done:,} / {total:,}" if total else f"{done:,}"
        drawn = f"<progress value={done} max={total}></progress>" if total else ""
        self._handle.update(self._html(f"{drawn} {place} <code>{escape(text)}</code>"))

    def close(self) -> None:
        if self._transient:
            self._handle.update(self._html(""))


def _in_notebook() -> bool:
    """Whether an IPython kernel (not a terminal shell) runs us."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
