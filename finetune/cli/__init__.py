"""The command line. Each command reads its arguments, takes one walk of `pipeline` and prints what came of it.

Imports that take time are inside the commands, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from finetune.cli.answers import chat, evaluate
from finetune.cli.cache import cache
from finetune.cli.conversion import convert
from finetune.cli.data import data
from finetune.cli.demo import quickstart
from finetune.cli.first_recipe import init, recipes
from finetune.cli.machine import doctor
from finetune.cli.planning import plan
from finetune.cli.routing import experts, profile
from finetune.cli.runs import check, prepare, report, resume, schema, train
from finetune.cli.templates import templates
from finetune.cli.weights import export, import_adapter, merge, quantize, verify

app = typer.Typer(
    name="finetune",
    help="Fine-tune Qwen3 and its mixture-of-experts models with LoRA: recipe -> train -> merge -> verify -> chat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        from finetune import __version__

        typer.echo(f"finetune {__version__}")
        raise typer.Exit


@app.callback(epilog="Any command takes --debug, which shows the traceback of an error.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


_COMMANDS: tuple[Callable[..., None], ...] = (
    quickstart, init, recipes, convert, check, plan, doctor, schema, prepare, data, quantize, profile, experts, train,
    resume, report, merge, verify, export, import_adapter, chat,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(templates, name="template")
app.add_typer(cache, name="cache")
