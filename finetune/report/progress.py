"""Progress of long reads and writes: live on a terminal and in a notebook, silent in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def rows_read(console: Console) -> Iterator[Callable[[str, int], None]]:
    """A line that counts; call what it gives with a file's name and the rows read so far."""
    columns = SpinnerColumn(), TextColumn("reading {task.description}"), TextColumn("{task.completed:,.0f} rows")
    with _live(console, *columns) as progress:
        task = progress.add_task("data", total=None)

        def advance(name: str, rows: int) -> None:
            progress.update(task, description=name, completed=rows)

        yield advance


@contextmanager
def bytes_done(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of bytes; call what it gives with a file's name, the bytes done and the bytes in all."""
    columns = TextColumn(f"{what} {{task.description}}"), BarColumn(24), DownloadColumn(), TimeRemainingColumn()
    with _live(console, *columns) as progress:
        task = progress.add_task("", total=None)

        def advance(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        yield advance


@contextmanager
def rows_done(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of rows; call what it gives with the rows done and the rows in all."""
    columns = TextColumn(what), BarColumn(24), TextColumn("{task.completed:,.0f} rows"), TimeRemainingColumn()
    with _live(console, *columns) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def _live(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar that leaves no trace when it is done."""
    live = console.is_terminal or console.is_jupyter
    return Progress(*columns, console=console, transient=True, disable=not live)
