"""Encoded rows that are kept for the next run: what is there, and removing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import AsJson
from finetune.cli.printing import open_console, print_json

cache = typer.Typer(help="Encoded rows that are kept for the next run.", rich_markup_mode=None)
Folder = Annotated[Path | None, typer.Option("--folder", help="that of data.cache; the usual one by default")]
DAY_S = 86_400


@cache.callback(invoke_without_command=True)
def show(context: typer.Context, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what is kept, and what it was made from."""
    if context.invoked_subcommand is not None:
        return
    import time

    from finetune.data.cache import MOST_BYTES, Cache, default_folder

    kept = Cache(folder or default_folder())
    entries = kept.entries()
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        rows = [
            {"folder": str(entry.folder), "bytes": entry.size_bytes, "used_s": entry.used_s}
            | {name: entry.facts.get(name) for name in ("source", "template", "rows", "tokens", "made")}
            for entry in entries
        ]
        print_json({"folder": str(kept.folder), "bytes": total, "entries": rows})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("made from", "rows", "tokens", "size", "made", "used"):
        table.add_column(name, justify="left" if name == "made from" else "right", overflow="fold")
    for entry in entries:
        facts = entry.facts
        used = time.strftime("%Y-%m-%d", time.localtime(entry.used_s))
        source = f"{facts.get('source')} ({facts.get('template')})"
        counts = (f"{facts.get(name) or 0:,}" for name in ("rows", "tokens"))
        table.add_row(source, *counts, _size(entry.size_bytes), str(facts.get("made"))[:10], used)
    console = open_console()
    if entries:
        console.print(table)
    sets = "1 set" if len(entries) == 1 else f"{len(entries):,} sets"
    console.print(f"{kept.folder}: {sets} of rows, {_size(total)} of at most {_size(MOST_BYTES)}", soft_wrap=True)


@cache.command("clear")
def clear(
    folder: Folder = None,
    older_than: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="only what was not used for so many days")
    ] = 0.0,
) -> None:
    """Remove what is kept; runs that read it go on."""
    from finetune.data.cache import Cache, default_folder

    removed = Cache(folder or default_folder()).clear(older_than * DAY_S)
    sets = "1 set" if len(removed) == 1 else f"{len(removed):,} sets"
    typer.echo(f"removed {sets} of rows, {_size(sum(entry.size_bytes for entry in removed))}")


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
