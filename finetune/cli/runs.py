"""Commands around a recipe: check it, look at its rows, train, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import AsJson, Overrides, RecipePath
from finetune.cli.planning import make_plan
from finetune.cli.printing import open_console, print_facts, print_json


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    plan: Annotated[bool, typer.Option("--plan", help="also: what a run takes here, see finetune plan")] = False,
) -> None:
    """Check a recipe; loads no model."""
    from finetune.config.load import load_recipe
    from finetune.config.summary import summarize

    checked = load_recipe(recipe, *(overrides or ()))
    if checked.experts.names_files:
        from finetune.routing.expert_files import ExpertFiles

        ExpertFiles.read(checked)
    summary = summarize(checked)
    planned = make_plan(checked) if plan else None
    if as_json:
        print_json(summary if planned is None else {**summary, "plan": planned.to_dict()})
        return
    print_facts(f"{recipe} is valid", summary)
    if planned is not None:
        planned.print()


def schema() -> None:
    """Print the JSON Schema of recipes."""
    from finetune.config.json_schema import recipe_json_schema

    print_json(recipe_json_schema())


def prepare(
    recipe: RecipePath,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="rows to print, loss-carrying tokens marked")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show rows as tokens, and which carry loss."""
    from finetune import pipeline
    from finetune.config.load import load_recipe
    from finetune.data.show import render_rows

    checked = load_recipe(recipe, *(overrides or ()))
    prepared, tokenizer = pipeline.prepare(checked, console=open_console(stderr=True))
    if as_json:
        print_json(prepared.report.to_dict())
        return
    console = open_console()
    if show:
        console.print(render_rows(prepared, tokenizer, show, color=console.is_terminal), soft_wrap=True)
    console.print(prepared.report.render())


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest complete checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove the run that is in the folder")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter."""
    from finetune.config.load import load_recipe

    checked = load_recipe(recipe, *(overrides or ()))

    from finetune import pipeline

    console = open_console(stderr=as_json)
    try:
        run = pipeline.train(checked, resume=resume, overwrite=overwrite, console=console)
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; continue with: finetune train {recipe} --resume", err=True)
        raise typer.Exit(130) from None
    from finetune.training.processes import end_process_group, is_main_process

    main = is_main_process()
    end_process_group()
    if not main:
        return
    if as_json:
        print_json(run.summary)
    else:
        print_facts("trained", run.summary)
        console.print(f"\nnext: finetune merge {run.adapter} --output {run.path / 'merged'}", soft_wrap=True)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the run by default")
    ] = None,
) -> None:
    """Write an HTML page about a run.

    Summary, curves, which experts trained, and how the routing changed.
    """
    from finetune import pipeline

    typer.echo(pipeline.report(run, output))
