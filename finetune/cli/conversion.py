"""The command for those who come from another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import AsJson
from finetune.cli.printing import open_console, print_json

if TYPE_CHECKING:
    from finetune.conversion.outcome import Conversion


def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="a config of Axolotl, LLaMA-Factory or TRL, or an Unsloth script")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="recipe to write")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="folder or hub name, in place of the file's")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    as_json: AsJson = False,
) -> None:
    """Write another tool's config as a recipe.

    Lists what became of each setting: mapped, dropped and why, or unknown.
    """
    from finetune.conversion.convert import convert as convert_file
    from finetune.errors import Problem, UserError
    from finetune.models.files import check_target_file, write_atomic

    if output.exists() and not overwrite:
        raise UserError(Problem(str(output), "exists", "name another --output, or give --overwrite"))
    made = convert_file(file, model)
    if made.recipe is not None:
        check_target_file(output)
        write_atomic(output, made.recipe.replace("RECIPE", str(output)).encode())
    if as_json:
        print_json(made.to_dict() | {"output": None if made.recipe is None else str(output)})
    else:
        _print(made, output)
    if made.refused:
        raise UserError(*made.refused)


def _print(made: Conversion, output: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    console = open_console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in (made.tool, "", "recipe"):
        table.add_column(column, overflow="fold")
    for mapped in made.mapped:
        table.add_row(mapped.key, Text(_short(mapped.value)), Text(f"{mapped.field}: {_short(mapped.ours)}"))
    for dropped in made.dropped:
        table.add_row(dropped.key, Text(_short(dropped.value)), Text(f"dropped: {dropped.reason}", style="yellow"))
    for key in made.unknown:
        table.add_row(key, "", Text("unknown", style="red"))
    console.print(table)
    if made.same:
        console.print(f"the same here: {', '.join(made.same)}", style="dim", soft_wrap=True, markup=False)
    for note in made.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    if made.recipe is None:
        return
    for problem in made.to_fix:
        console.print(f"to fix: {problem.where.partition(': ')[2]} {problem.what}; {problem.hint}", style="yellow",
                      soft_wrap=True, markup=False)  # fmt: skip
    counts = f"{len(made.mapped)} mapped, {len(made.dropped)} dropped, {len(made.unknown)} unknown"
    console.print(f"\nwrote {output}: {counts}\nnext: finetune check {output}", soft_wrap=True, markup=False)


def _short(value: Any) -> str:
    text = (
        str(value)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value)
        else ", ".join(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."
