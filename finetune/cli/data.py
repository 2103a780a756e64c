"""The quality of a recipe's rows: `finetune data`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.options import AsJson, Overrides, RecipePath
from finetune.cli.printing import open_console, print_json


def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    eval_too: Annotated[
        bool, typer.Option("--eval", help="look for defects in the files of data.eval as well")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what may be wrong with the rows before training is paid for.

    Lengths, copies and near copies, overlap with held-out rows, empty and repeated answers, scripts and odd characters,
    for each file, with examples and remedies; reads every row, needs no weights.
    """
    from finetune import pipeline
    from finetune.config.load import load_recipe

    checked = load_recipe(recipe, *(overrides or ()))
    found = pipeline.data_report(checked, eval_too=eval_too, console=open_console(stderr=True))
    if as_json:
        print_json(found.to_dict())
    else:
        open_console().print(found)
