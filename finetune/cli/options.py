"""Arguments and options that several commands share, and what is made of their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.completion import complete_override, complete_recipe

RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="a YAML file, or a name of `finetune recipes`", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=50", autocompletion=complete_override),
]
AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help="folder of an adapter, such as RUN/adapter")]
AdapterPaths = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="one adapter, or several to add up")]
Shares = Annotated[
    str | None,
    typer.Option("--weights", metavar="NUMBER,...", help="what each adapter's change is multiplied with, e.g. 0.7,0.3"),
]
ModelPath = Annotated[
    str, typer.Argument(metavar="MODEL_OR_ADAPTER", help="folder of a model, an adapter or a run, or a hub name")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, last on stdout")]
WeightType = Annotated[
    Literal["bf16", "fp16", "fp32"] | None, typer.Option("--dtype", help="of the weights; as stored by default")
]
Onto = Annotated[
    Literal["original", "dequantized"],
    typer.Option(
        "--onto",
        help="after QLoRA: add to the base's original weights, or to the dequantized ones that the run saw",
    ),
]
LoadedWeights = Annotated[
    Literal["packed", "original"],
    typer.Option("--base-weights", help="below an adapter of a QLoRA run: packed as in the run, or original"),
]
BasePath = Annotated[Path | None, typer.Option("--base", help="base model; where the adapter says it is, by default")]


def parse_shares(text: str | None) -> list[float] | None:
    """The numbers of `--weights`."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not one number per adapter, as in 0.7,0.3", param_hint="--weights"
        ) from None
