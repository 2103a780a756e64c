"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import AsJson
from finetune.cli.printing import open_console, print_json


def compare(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder with runs in it")] = Path("runs"),
    sort: Annotated[str, typer.Option("--sort", metavar="COLUMN", help="column to sort by, as --json names it")] = (
        "date"
    ),
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="also write a page with the curves over one another")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: steps, losses, speed, memory, and whether they ended."""
    from finetune import pipeline
    from finetune.models.files import check_target_file, write_atomic

    if html is not None:
        check_target_file(html)
    found = pipeline.runs(folder, sort=sort)
    if html is not None:
        write_atomic(html, found.to_html(folder.resolve().name).encode())
    if as_json:
        print_json(found.to_dict())
        return
    open_console().print(found.render() if found.rows else f"no runs in {folder}", markup=False)
