"""Arguments and options that several commands share, and what is made of their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe, see recipes/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=50")]
AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help="folder of an adapter, such as RUN/adapter")]
AdapterPaths = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="one adapter, or several to add up")]
Shares = Annotated[
    str | None,
    typer.Option("--weights", metavar="NUMBER...", help="what each adapter's change is multiplied with, e.g. 0.7 0.3"),
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL_OR_ADAPTER", help="a model or adapter folder, or a hub name")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, last on stdout")]
WeightType = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; as it is stored by default")]
BaseWeights = Annotated[
    str,
    typer.Option(
        "--base-weights",
        help="after QLoRA: add to the base's original weights, or to the dequantized ones that the run saw",
    ),
]
LoadedWeights = Annotated[
    str,
    typer.Option("--base-weights", help="below an adapter of a QLoRA run: packed as in the run, or original"),
]
BasePath = Annotated[Path | None, typer.Option("--base", help="base model; where the adapter says it is, by default")]


class TakesWeights(TyperCommand):
    """Lets `--weights` be followed by several numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Click's, with the numbers behind `--weights` as one argument."""
        joined: list[str] = []
        for arg in args:
            if len(joined) > 1 and joined[-2] == "--weights" and _is_number(arg):
                joined[-1] += f" {arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_shares(text: str | None) -> list[float] | None:
    """The numbers of `--weights`."""
    if text is None:
        return None
    parts = text.replace(",", " ").split()
    if not parts or not all(map(_is_number, parts)):
        raise typer.BadParameter(f"{text!r} is not one number per adapter", param_hint="--weights")
    return [float(part) for part in parts]


def parse_base_weights(text: str, allowed: tuple[str, str] = ("original", "dequantized")) -> str:
    """`--base-weights`, which must be one of `allowed`."""
    if text not in allowed:
        raise typer.BadParameter(f"{text!r} is neither {' nor '.join(allowed)}", param_hint="--base-weights")
    return text


def parse_dtype(text: str | None) -> str | None:
    """`--dtype`."""
    allowed = ("bf16", "fp16", "fp32")
    if text is not None and text not in allowed:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(allowed)}", param_hint="--dtype")
    return text
