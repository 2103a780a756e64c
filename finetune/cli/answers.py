"""Commands that let a model answer: chat, eval."""

from __future__ import annotations

from pathlib import Path
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
    data: Annotated[
        list[str] | None, typer.Option("--data", help="file with rows; may be given several times", show_default=False)
    ] = None,
    template: Annotated[str, typer.Option("--template", help="data template of the files")] = "chat",
    by: Annotated[str | None, typer.Option("--by", help="also report per value of this field of the rows")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="rows of each file, or task, at most")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="let the model write its answers, and judge them")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="a .jsonl file for prompts, references, answers and metrics")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="MODULE:FUNCTION", help="own metric: (answer, reference, row) -> number"),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="of numbers that are to match")] = 1e-6,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens of one answer at most")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy")] = 0.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="answers written at a time")] = 16,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="base|PATH", help="side by side with the base, or another model or adapter"),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option("--harness", metavar="TASK,...", help="tasks of lm-evaluation-harness instead of --data"),
    ] = None,
    harness_tasks: Annotated[
        Path | None, typer.Option("--harness-tasks", metavar="FOLDER", help="tasks of your own for --harness")
    ] = None,
    dtype: WeightType = None,
    base: BasePath = None,
    base_weights: LoadedWeights = "packed",
    as_json: AsJson = False,
) -> None:
    """Exact match and loss on files of rows; with --generate also how good the model's own answers are."""
    from finetune import pipeline
    from finetune.inference.eval_report import EvalReport
    from finetune.inference.harness import HarnessReport

    if (harness is None) == (not data):
        raise typer.BadParameter("give files with rows, or tasks of --harness, and not both", param_hint="--data")
    rows_only = {"generate": generate, "output": output, "metric": metric, "against": against, "by": by}
    if harness is not None and (given := [f"--{name}" for name, value in rows_only.items() if value]):
        raise typer.BadParameter(f"does not go with {', '.join(given)}", param_hint="--harness")
    if harness is None and harness_tasks is not None:
        raise typer.BadParameter("goes with --harness", param_hint="--harness-tasks")
    result: EvalReport | HarnessReport
    if harness is not None:
        result = pipeline.harness(
            path,
            [task.strip() for task in harness.split(",") if task.strip()],
            task_folder=harness_tasks,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            base=base,
            base_weights=base_weights,
        )
    else:
        result = pipeline.evaluate(
            path,
            data or [],
            template=template,
            by=by,
            limit=limit,
            generate=generate,
            output=output,
            metrics=metric or (),
            tolerance=tolerance,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            against=against,
            dtype=dtype,
            base=base,
            base_weights=base_weights,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        open_console().print(result.render())
