"""Commands that let a model answer: chat, eval."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.options import AsJson, BasePath, LoadedWeights, ModelPath, WeightType
from finetune.cli.printing import open_console, print_json


def chat(
    path: ModelPath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="answer this and exit")] = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking", help="reason before answering")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens of one reply at most")] = 512,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="0 is greedy")] = None,
    dtype: WeightType = None,
    base: BasePath = None,
    base_weights: LoadedWeights = "packed",
) -> None:
    """Talk to a model or an adapter."""
    from finetune import pipeline

    pipeline.chat(
        path,
        prompt,
        system=system,
        thinking=thinking,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        dtype=dtype,
        base=base,
        base_weights=base_weights,
        console=open_console(),
    )


def evaluate(
    path: ModelPath,
    data: Annotated[list[str], typer.Option("--data", help="file with rows; may be given several times")],
    template: Annotated[str, typer.Option("--template", help="data template of the files")] = "chat",
    by: Annotated[str | None, typer.Option("--by", help="also report per value of this field of the rows")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="rows of each file at most")] = None,
    dtype: WeightType = None,
    base: BasePath = None,
    base_weights: LoadedWeights = "packed",
    as_json: AsJson = False,
) -> None:
    """Exact match and loss on files of rows."""
    from finetune import pipeline

    result = pipeline.evaluate(
        path, data, template=template, by=by, limit=limit, dtype=dtype, base=base, base_weights=base_weights
    )
    if as_json:
        print_json(result.to_dict())
    else:
        open_console().print(result.render())
