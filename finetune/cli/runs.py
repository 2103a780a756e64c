"""Commands around a recipe: check it, look at its rows, train, report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import AsJson, Overrides, RecipePath
from finetune.cli.planning import make_plan
from finetune.cli.printing import open_console, print_facts, print_json

if TYPE_CHECKING:
    from finetune.pipeline import Run


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
    from finetune.data.look import look

    notes = look(checked)
    summary = summarize(checked)
    planned = make_plan(checked) if plan else None
    if as_json:
        print_json(summary | {"notes": notes} | ({} if planned is None else {"plan": planned.to_dict()}))
        return
    print_facts(f"{recipe} is valid", summary)
    for note in notes:
        open_console().print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
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
    from finetune.config.steps import Steps
    from finetune.data.feedback.show import render_feedback
    from finetune.data.scripts import in_words, trained_scripts
    from finetune.data.show import render_rows
    from finetune.reports.tables import warnings

    checked = load_recipe(recipe, *(overrides or ()))
    prepared, tokenizer = pipeline.prepare(checked, console=open_console(stderr=True))
    steps = Steps.of(checked, prepared.report.train.blocks)
    scripts = trained_scripts(prepared.train, tokenizer)
    if as_json:
        counts = {"steps": steps.total, "warmup_steps": steps.warmup, "warnings": steps.warnings()}
        print_json(prepared.report.to_dict() | counts | {"scripts": scripts})
        return
    console = open_console()
    if show:
        render = render_rows if checked.train.objective == "sft" else render_feedback
        console.print(render(prepared, tokenizer, show, color=console.is_terminal), soft_wrap=True)
    console.print(prepared.report.render(), f"scripts of what is trained: {in_words(scripts)}", sep="\n")
    console.print(steps.text(), *warnings(steps.warnings()), sep="\n")


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

    again = ["finetune", "train", str(recipe), *(overrides or ()), *(["--json"] if as_json else [])]
    with _told_how_to_go_on(Path(checked.output.dir), again), _json_alone(as_json):
        run = pipeline.train(checked, resume=resume, overwrite=overwrite, console=open_console(stderr=as_json))
    _print_run(run, as_json)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Continue a run from its newest complete checkpoint.

    With output.dir=NEW and a higher train.steps, a new run goes on from there and takes more steps.
    """
    from finetune import pipeline

    again = ["finetune", "resume", str(run), *(overrides or ()), *(["--json"] if as_json else [])]
    with _told_how_to_go_on(run, again), _json_alone(as_json):
        done = pipeline.resume(run, *(overrides or ()), console=open_console(stderr=as_json))
    _print_run(done, as_json)


def _json_alone(as_json: bool) -> AbstractContextManager[object]:
    """What libraries print goes to stderr where stdout is for one JSON object."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


@contextmanager
def _told_how_to_go_on(folder: Path, again: list[str]) -> Iterator[None]:
    """Ctrl-C inside is answered with the command that continues, or that starts anew where nothing was saved yet."""
    try:
        yield
    except KeyboardInterrupt:
        from finetune.training.checkpoints import is_complete, list_checkpoints
        from finetune.training.run_folder import RunFolder

        found = RunFolder(folder)
        saved = any(is_complete(checkpoint) for checkpoint in list_checkpoints(found.checkpoints))
        if saved:
            words = "interrupted; continue with: "
            again = again if again[1] == "resume" else [*again, "--resume"]
        else:
            words = "interrupted before the first checkpoint; start anew with: "
            again = [*again, "--overwrite"] if found.holds_run else again
        open_console(stderr=True).print(f"\n{words}{shlex.join(again)}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _print_run(run: Run, as_json: bool) -> None:
    from finetune.training.processes import end_process_group, is_main_process

    main = is_main_process()
    end_process_group()
    if not main:
        return
    if as_json:
        print_json(run.summary)
        return
    print_facts("trained", run.summary)
    command = shlex.join(["finetune", "merge", str(run.adapter), "--output", str(run.path / "merged")])
    open_console().print(f"\nnext: {command}", markup=False, soft_wrap=True)


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
