"""The command about the machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import AsJson, Overrides
from finetune.cli.printing import open_console, print_facts, print_json

if TYPE_CHECKING:
    from rich.table import Table


def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="also: what this recipe needs")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what will run on this machine and why, and check that it is right.

    Exits 1 when something is wrong, or lacking for the recipe.
    """
    from finetune.config.load import load_recipe

    checked = None if recipe is None else load_recipe(recipe, *(overrides or ()))

    from finetune.doctor.examination import examine
    from finetune.reports.progress import waiting

    with waiting(open_console(stderr=True), "checking what will run here (compiled once)"):
        facts = examine(checked)
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if not facts["ok"]:
        raise typer.Exit(1)


def _print(facts: dict[str, Any]) -> None:
    console = open_console()
    _print_machine(facts["machine"])
    console.print(_libraries(facts["libraries"]))
    console.print(_runs(facts["runs"]))
    console.print(_caches(facts["caches"]))
    if "recipe" in facts:
        print_facts("\nrecipe", facts["recipe"])
    for component in facts["runs"]:
        if component["fault"] is not None:
            what, hint = f"{component['name']}: {component['fault']}", component["remedy"]
            console.print(f"\nerror: {what}\nhint: {hint}", style="red", markup=False)
    for lack in facts.get("lacks", ()):
        console.print(f"\nerror: {lack['where']}: {lack['what']}\nhint: {lack['hint']}", style="red", markup=False)
    for library in facts["libraries"]:
        if library["in_range"] is False:
            what = f"{library['name']} {library['version']} is outside {library['range']}, and untried"
            console.print(f"warning: {what}", style="yellow", markup=False)
    if facts["ok"]:
        console.print("\neverything that would run here is right", style="green")


def _print_machine(machine: dict[str, Any]) -> None:
    devices = [
        f"{device['name']}, {device['memory_gib']:.1f} GiB ({device['free_gib']:.1f} free), "
        f"compute capability {device['compute_capability']}"
        for device in machine["devices"]
    ]
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']:.1f} GiB"
    facts = {
        "GPU": "\n".join(devices) or f"none: {machine['why_no_gpu']}",
        "driver, CUDA": ", ".join(filter(None, (machine["driver"], machine["cuda"]))) or None,
        "processor": f"{machine['processor']}, {machine['cores']} cores{memory}",
        "system": f"{machine['system']}, Python {machine['python']}",
        "C++ compiler": machine["compiler"] or "none, which compiled layers need",
        "Triton": "TRITON_INTERPRET is set: Triton's kernels run in an interpreter" if machine["interpreted"] else None,
    }
    print_facts("machine", facts)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=f"\n{title}", title_justify="left", show_header=bool(columns), box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim")
    return table


def _libraries(libraries: list[dict[str, Any]]) -> Table:
    table = _table("libraries", "", "version", "range", "", "for")
    for library in libraries:
        state = {None: "", True: "ok", False: "outside"}[library["in_range"]]
        state = "missing" if library["version"] is None else state
        table.add_row(library["name"], library["version"] or "-", library["range"] or "?", state, library["for"])
    return table


def _runs(components: list[dict[str, Any]]) -> Table:
    from rich.markup import escape

    table = _table("what runs here", "", "runs", "check", "why nothing better")
    for component in components:
        state = "wrong" if component["fault"] is not None else "ok" if component["checked"] else "-"
        table.add_row(component["name"], component["runs"], state, escape(component["why_not_better"]))
    return table


def _caches(caches: list[dict[str, Any]]) -> Table:
    table = _table("kept between runs", "", "folder", "size")
    table.columns[1].overflow = "fold"
    for cache in caches:
        table.add_row(cache["what"], cache["path"], f"{cache['gib'] * 1024:,.1f} MiB" if cache["gib"] else "nothing")
    return table
