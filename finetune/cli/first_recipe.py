"""Recipes to start from: those that come with the package, and one that is written for a model, rows and a card."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.completion import complete_recipe_name
from finetune.cli.options import AsJson
from finetune.cli.planning import Gpu, GpuGib, named_device
from finetune.cli.printing import open_console, print_json
from finetune.config.package_files import (
    NEW_SKILL,
    NEW_SKILL_HELD_OUT,
    OLD_SKILLS,
    TINY_MODEL,
    recipe_file,
    recipe_names,
    with_examples,
)
from finetune.errors import DataError, Problem, UserError

if TYPE_CHECKING:
    from finetune.planning.device import Device
    from finetune.planning.proposal import Proposal, Rows

HERE = "here"
LOOKED_AT = 1000
"""Rows of a file."""


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="print this one", autocompletion=complete_recipe_name)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with the package, or print one."""
    from finetune.config.load import parse_recipe
    from finetune.diagnostics.advice import did_you_mean
    from finetune.planning.proposal import method

    if name is not None and name not in recipe_names():
        hint = did_you_mean(name, recipe_names()) or f"known are {', '.join(recipe_names())}"
        raise UserError(Problem("NAME", "is no recipe that comes with the package", hint, name))
    if name is not None and not as_json:
        typer.echo(recipe_file(name).read_text(encoding="utf-8"), nl=False)
        return
    found = []
    for each in recipe_names() if name is None else (name,):
        text = recipe_file(each).read_text(encoding="utf-8")
        recipe = parse_recipe(text, each)
        model = TINY_MODEL if recipe.model.path.endswith(TINY_MODEL) else recipe.model.path
        found.append({"name": each, "model": model, "card": _card(text), "method": method(recipe)})
    if as_json:
        print_json({"recipes": found})
        return
    from rich.table import Table

    table = Table("recipe", "model", "card", "method", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for row in found:
        table.add_row(row["name"], Path(row["model"]).name, row["card"], row["method"])
    console = open_console()
    console.print(table)
    console.print("\nnext: finetune train NAME data.train=my-rows.jsonl", soft_wrap=True)


def _card(text: str) -> str:
    """What a recipe needs by its header: `24 GB`, `any CPU`."""
    needs = re.search(r"^# Needs: +([^,.(]+)", text, re.MULTILINE)
    words = needs[1].strip() if needs else ""
    size = re.search(r"GPU with (\d+ GB)", words)
    return words if size is None else size[1] + (" or a CPU" if "CPU" in words else "")


def init(
    model: Annotated[
        str | None, typer.Option("--model", help="a folder, or a name on the hub; the embedded model by default")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="rows; may be given several times; examples by default")
    ] = None,
    gpu: Gpu = None,
    gpu_gib: GpuGib = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing, take the defaults")] = False,
) -> None:
    """Write a recipe for a model, rows and a card.

    Asks in a terminal for what is not given.
    """
    from finetune.config.commented import commented_yaml
    from finetune.config.load import parse_recipe
    from finetune.models.files import check_target_file, write_atomic
    from finetune.models.hub_config import find_shape
    from finetune.planning.proposal import propose
    from finetune.reports.plan_table import verdict_line

    if output.exists() and not overwrite:
        raise UserError(Problem(str(output), "exists", "name another --output, or give --overwrite"))
    check_target_file(output)
    asks = not yes and is_terminal()
    if model is None:
        model = _ask("model, a folder or a name on the hub", TINY_MODEL) if asks else TINY_MODEL
    shape = find_shape(with_examples(model))
    if data is None and asks:
        answer = _ask("rows: a file, a folder, or a data set of the hub", f"examples for {Path(model).name}")
        data = None if answer.startswith("examples for ") else [answer]
    device = _asked_device() if asks and gpu is None and gpu_gib is None else named_device(gpu, gpu_gib)
    rows = look_at(data) if data else example_rows(embedded=model == TINY_MODEL)
    folder = "runs/" + (re.sub(r"[^\w.-]+", "-", Path(model).name.lower()).strip("-.") or "first")
    proposal = propose(model, shape, rows, device, folder, local=Path(with_examples(model)).is_dir())
    text = commented_yaml(proposal.tree, proposal.comments, _header(proposal, model, output))
    parse_recipe(text, str(output), check_files=True)
    write_atomic(output, text.encode())
    console = open_console()
    console.print(f"wrote {output}: {proposal.title} of {model}", soft_wrap=True, markup=False)
    console.print("memory", verdict_line(proposal.plan))
    if proposal.plan.verdict == "does not fit":
        hint = "take a smaller model or a larger card; finetune plan shows what takes the memory"
        console.print(f"warning: this is the most frugal recipe, and it does not fit: {hint}", style="yellow")
    console.print(f"next: finetune check {output}, then finetune train {output}", soft_wrap=True, markup=False)


def look_at(paths: list[str]) -> Rows:
    """The shape of rows by the head of each local file; chats where they are elsewhere."""
    from finetune.config.schema import DataFile
    from finetune.data.bad_rows import BadRows
    from finetune.data.fit import fitting_columns, suggest_template
    from finetune.data.rows import read_rows
    from finetune.planning.proposal import Rows
    from finetune.planning.work import BYTES_PER_TOKEN, text_bytes

    template, columns, longest = None, None, 0
    for path in paths:
        if not Path(with_examples(path)).exists() and not any(mark in path for mark in "*?["):
            continue  # of the hub, or a mistake that the check of the recipe finds
        for number, row in enumerate(read_rows(DataFile(path=path, limit=LOOKED_AT), BadRows())):
            longest = max(longest, int(text_bytes(row.fields) / BYTES_PER_TOKEN))
            if number or template is not None:
                continue
            template = suggest_template(row.fields)
            if template is None and (found := fitting_columns(row.fields)) is not None:
                template, columns = found
            if template is None:
                what = f"has rows that no data template reads: {', '.join(row.fields)}"
                hint = "`finetune template new mine --kind turns > mine.yaml` prints one to fill in; see data.template"
                raise DataError(Problem(path, what, hint))
    return Rows(
        tuple(paths), template=template or "chat", columns=columns, longest=0 if template == "text" else longest
    )


def example_rows(*, embedded: bool) -> Rows:
    """Rows that come with the package: for the embedded model, or to stand where the user's will."""
    from finetune.planning.proposal import Rows

    train = (NEW_SKILL, OLD_SKILLS)
    return Rows(train, (NEW_SKILL_HELD_OUT,)) if embedded else Rows(train, are_examples=True)


def is_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _ask(what: str, default: str) -> str:
    return str(typer.prompt(what, default=default)).strip()


def _asked_device() -> Device:
    """A card by name or GiB; asked again until it is known."""
    from finetune.planning.device import this_machine

    machine = this_machine()
    while True:
        answer = _ask(f"card, by name or GiB ({HERE}: {machine.title})", HERE)
        try:
            if answer == HERE:
                return machine
            size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:gib|gb)?", answer, re.IGNORECASE)
            return named_device(None, float(size[1])) if size else named_device(answer, None)
        except UserError as error:
            open_console(stderr=True).print(error.on_command_line(), style="yellow", markup=False)


def _header(proposal: Proposal, model: str, output: Path) -> list[tuple[str, str]]:
    from finetune.reports.plan_table import verdict_line

    run = proposal.plan.recipe.output.dir
    download = "" if not proposal.plan.disk.download else f"; {proposal.plan.disk.download / 1e9:,.0f} GB from the hub"
    return [
        ("What", f"{proposal.title} of {model}, by `finetune init`."),
        ("Needs", f"by the plan, {verdict_line(proposal.plan).plain.partition(': ')[2]}{download}."),
        ("First", f"finetune check {output}; finetune prepare {output} --show 3"),
        ("Run", f"finetune train {output}"),
        ("Override", f"finetune train {output} train.learning_rate=1e-4 output.dir=runs/second"),
        ("Next", f"finetune merge {run}/adapter --output {run}-merged"),
    ]
