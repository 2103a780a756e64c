"""Data templates of one's own."""

from __future__ import annotations

from typing import Annotated

import typer

templates = typer.Typer(help="Data templates of your own.", no_args_is_help=True, rich_markup_mode=None)


@templates.callback()
def _root() -> None:
    pass


@templates.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="what to call it, or one that comes with the package")],
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="messages, turns (default), completion, text, preference, labeled or prompt"),
    ] = None,
) -> None:
    """Print a data template with comments, to start from."""
    from finetune.data.new_template import new_template

    typer.echo(new_template(name, kind), nl=False)
