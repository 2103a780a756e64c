"""What commands print: JSON last on stdout, facts as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """Where a command prints; commands that print JSON tell their progress on stderr."""
    from finetune.report.console import open_console

    return open_console(stderr=stderr)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """Names and values as a table, without those that say nothing."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if value is None or value in ([], {}, ()):
            continue
        table.add_row(name.replace("_", " "), _plain(value))
    open_console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        known = {key: item for key, item in value.items() if item is not None and item not in ([], ())}
        return ", ".join(f"{key} {_plain(item)}" for key, item in known.items())
    if isinstance(value, list | tuple):
        separator = "\n" if any(isinstance(item, dict) for item in value) else ", "
        return separator.join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
