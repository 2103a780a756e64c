"""The command line. Each command reads its arguments, takes one walk of `pipeline` and prints what came of it.

Imports that take time are inside the commands, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="finetune",
    help="Fine-tune Qwen3 and its mixture-of-experts models with LoRA: recipe -> train -> merge -> verify -> chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


SCORES = ("tokens", "gate", "mass", "gradient", "contrast", "random")


class _TakesWeights(TyperCommand):
    """Lets `--weights` be followed by several numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
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


def _shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    parts = text.replace(",", " ").split()
    if not parts or not all(map(_is_number, parts)):
        raise typer.BadParameter(f"{text!r} is not one number per adapter", param_hint="--weights")
    return [float(part) for part in parts]


def _print_version(asked: bool) -> None:
    if asked:
        from finetune import __version__

        typer.echo(f"finetune {__version__}")
        raise typer.Exit


@app.callback(epilog="Any command takes --debug, which shows the traceback of an error.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe; loads no model."""
    from finetune.config.load import load_recipe
    from finetune.config.summary import summarize

    summary = summarize(load_recipe(recipe, *(overrides or ())))
    if as_json:
        _print_json(summary)
    else:
        _print_facts(f"{recipe} is valid", summary)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes."""
    from finetune.config.json_schema import recipe_json_schema

    _print_json(recipe_json_schema())


@app.command()
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
    prepared, tokenizer = pipeline.prepare(checked, console=_console(stderr=True))
    if as_json:
        _print_json(prepared.report.to_dict())
        return
    console = _console()
    if show:
        console.print(render_rows(prepared, tokenizer, show, color=console.is_terminal), soft_wrap=True)
    console.print(prepared.report.render())


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model folder, or a hub name")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    scheme: Annotated[str, typer.Option("--scheme", help="nf4 or fp8")] = "nf4",
    block: Annotated[int | None, typer.Option("--block", help="weights that share a scale (nf4): 64 or 128")] = None,
    attention: Annotated[bool | None, typer.Option(help="linear layers of attention and dense MLPs (nf4)")] = None,
    experts: Annotated[bool, typer.Option(help="the experts")] = True,
    double: Annotated[bool, typer.Option(help="the scales too (nf4)")] = True,
    revision: Annotated[str | None, typer.Option("--revision", help="of a model on the hub")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack a model's weights once, so that QLoRA runs load it in seconds."""
    from finetune import pipeline

    settings: Any = {"scheme": scheme, "attention": attention, "experts": experts, "block": block, "double": double}
    console = _console(stderr=as_json)
    packed = pipeline.quantize(model, output, settings, revision=revision, console=console)
    size = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        _print_json({"output": str(output), "packed_weights": packed, "bytes": size})
    else:
        lines = f"wrote {output}: {packed:,} weights packed, {size / 2**30:.2f} GiB"
        console.print(f"{lines}\nnext: finetune train RECIPE model.path={output}", soft_wrap=True)


@app.command()
def profile(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("routing.json"),
    as_json: AsJson = False,
) -> None:
    """Measure which experts the recipe's rows use."""
    from finetune.config.load import load_recipe

    checked = load_recipe(recipe, *(overrides or ()))

    from finetune import pipeline
    from finetune.report.routing_table import profile_facts
    from finetune.routing.select import split_half_stability

    console = _console(stderr=as_json)
    measured = pipeline.profile(checked, output=output, console=console)
    if as_json:
        stability = split_half_stability(measured, checked.experts.select)
        _print_json(profile_facts(measured, stability) | {"output": str(output)})
    else:
        console.print(f"\nwrote {output}\nnext: finetune experts {output} --top-fraction 0.25", soft_wrap=True)


@app.command()
def experts(
    routing: Annotated[Path, typer.Argument(metavar="ROUTING", help="a routing.json, see finetune profile")],
    score: Annotated[str, typer.Option("--score", help=f"one of {', '.join(SCORES)}")] = "tokens",
    top_fraction: Annotated[float | None, typer.Option("--top-fraction", help="share of each layer's experts")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="share of each layer's score to carry")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="most trainable parameters, such as 100M")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="split the budget evenly over the layers")] = False,
    against: Annotated[Path | None, typer.Option("--against", help="profile of general data, for contrast")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of score random")] = 0,
    rank: Annotated[int, typer.Option("--rank", min=1, help="LoRA rank, which prices an expert")] = 16,
    hot_rank: Annotated[int | None, typer.Option("--hot-rank", min=1, help="rank of the hottest of them")] = None,
    hot_fraction: Annotated[
        float | None, typer.Option("--hot-fraction", help="share of each layer's experts that has --hot-rank")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", help="model folder, to price an expert by")] = None,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", help="plan to write")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="image to write, such as experts.png")] = None,
    as_json: AsJson = False,
) -> None:
    """Explore which experts a rule would train; loads no model."""
    from finetune.report.routing_table import exploration_to_dict, render_explorations
    from finetune.routing.explore import explore
    from finetune.routing.plan_file import write_plan

    rule = {"top_fraction": top_fraction, "top_p": top_p, "budget": budget}
    rule |= {"budget_per": "layer"} if per_layer else {}
    asked = any(value is not None for value in rule.values())
    section: dict[str, Any] = {"score": score}
    section |= {"select": rule if asked else None, "against": None if against is None else str(against)}
    if hot_rank is not None or hot_fraction is not None:
        if budget is not None:
            raise typer.BadParameter("does not go with --budget, which counts one rank", param_hint="--hot-rank")
        section["hot"] = {"rank": hot_rank, "top_fraction": hot_fraction}
    found = explore(routing, section, seed=seed, rank=rank, model=model)
    if plan_out is not None:
        if not asked:
            raise typer.BadParameter("needs a rule, such as --top-fraction 0.25", param_hint="--plan-out")
        write_plan(plan_out, found[0].plan)
    if plot is not None:
        from finetune.report.routing_plots import plot_profile

        plot_profile(found[0].profile, found[0].plan if asked else None).savefig(plot)
    if as_json:
        _print_json(exploration_to_dict(found[0]) if asked else {"choices": [exploration_to_dict(e) for e in found]})
    else:
        console = _console()
        console.print(render_explorations(found))
        if plan_out is not None:
            console.print(f"\nwrote {plan_out}; train with it: experts.select.file={plan_out}", soft_wrap=True)


@app.command()
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

    console = _console(stderr=as_json)
    try:
        run = pipeline.train(checked, resume=resume, overwrite=overwrite, console=console)
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; continue with: finetune train {recipe} --resume", err=True)
        raise typer.Exit(130) from None
    from finetune.training.processes import is_main_process

    if not is_main_process():
        return
    if as_json:
        _print_json(run.summary)
    else:
        _print_facts("trained", run.summary)
        console.print(f"\nnext: finetune merge {run.adapter} --output {run.path / 'merged'}", soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the run by default")
    ] = None,
) -> None:
    """One HTML page about a run: summary, curves, which experts trained, and how the routing changed."""
    from finetune import pipeline

    typer.echo(pipeline.report(run, output))


@app.command(cls=_TakesWeights)
def merge(
    adapters: AdapterPaths,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    base: BasePath = None,
    weights: Shares = None,
    base_weights: BaseWeights = "original",
    dtype: WeightType = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a merge that was killed")] = False,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="prove the result afterwards")] = True,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into their base model, and prove it."""
    from finetune import pipeline

    progress = _console(stderr=True)
    settings: dict[str, Any] = {"base": base, "weights": _shares(weights), "base_weights": _base_weights(base_weights)}
    report = pipeline.merge(adapters, output, **settings, dtype=_dtype(dtype), resume=resume, console=progress)
    if not as_json:
        _console().print(report)
    proof = pipeline.verify(adapters, output, **settings) if check else None
    if as_json:
        _print_json({**report.to_dict(), "verify": proof and proof.to_dict()})
    elif proof:
        _console().print(proof)
    else:
        _console().print(f"\nnext: finetune verify {' '.join(map(str, adapters))} {output}", soft_wrap=True)


@app.command(cls=_TakesWeights)
def verify(
    adapters: AdapterPaths,
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="the folder merge made")],
    base: BasePath = None,
    weights: Shares = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="text to compare on; may be repeated")] = None,
    base_weights: BaseWeights = "original",
    as_json: AsJson = False,
) -> None:
    """Prove that merged = base + adapter."""
    from finetune import pipeline

    settings: dict[str, Any] = {"weights": _shares(weights), "base_weights": _base_weights(base_weights)}
    report = pipeline.verify(adapters, merged, base=base, prompts=prompts or None, **settings)
    if as_json:
        _print_json(report.to_dict())
    else:
        _console().print(report)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="an adapter, or a model such as merge made")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="adapters: peft, peft-per-expert, vllm, sglang, gguf-lora; models: gguf, fp8, fp8-ct, int4, gptq, "
            "awq, hf",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    base: BasePath = None,
    dtype: WeightType = None,
    gguf_type: Annotated[
        str, typer.Option("--type", help="gguf: F32, F16, BF16, Q8_0, Q4_0, Q6_K, Q5_K_M ...")
    ] = "F16",
    shard_gb: Annotated[float, typer.Option("--shard-gb", help="size of a file at most, in 10^9 bytes")] = 4.0,
    group: Annotated[int, typer.Option("--group", min=8, help="int4, gptq, awq: weights per scale")] = 128,
    data: Annotated[list[str] | None, typer.Option("--data", help="gptq, awq: file with rows to fit to")] = None,
    template: Annotated[str, typer.Option("--template", help="gptq, awq: data template of the files")] = "chat",
    blocks: Annotated[int, typer.Option("--calibration-blocks", min=1, help="gptq, awq: blocks of tokens")] = 128,
    length: Annotated[int, typer.Option("--calibration-length", min=8, help="gptq, awq: tokens of a block")] = 512,
    steps: Annotated[int, typer.Option("--calibration-steps", min=0, help="gptq, awq: search steps per layer")] = 200,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="what it was trained for, where no run wrote it down"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an export that was killed")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter or a model as another program reads it."""
    from finetune import pipeline
    from finetune.export.calibrated import Calibration
    from finetune.export.model_export import ModelOptions

    kept: Any = _dtype(dtype)
    calibration = Calibration(tuple(data or ()), template, blocks, length, steps)
    options = ModelOptions(gguf_type, kept, int(shard_gb * 1e9), group, thinking, calibration)
    console = _console(stderr=True)
    report = pipeline.export(source, output, to, base=base, options=options, resume=resume, console=console)
    if as_json:
        _print_json(report.to_dict())
    else:
        _console().print(report, soft_wrap=True)


@app.command()
def import_adapter(
    adapter: AdapterPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    packing: Annotated[
        str | None,
        typer.Option("--packing", help="peft, peft-0.18, expert-major or expert-major-0.18; where the file is silent"),
    ] = None,
    base: BasePath = None,
    as_json: AsJson = False,
) -> None:
    """Take over an adapter that was made elsewhere."""
    from finetune import pipeline

    report = pipeline.import_adapter(adapter, output, packing=packing, base=base)
    if as_json:
        _print_json(report.to_dict())
    else:
        _console().print(report, soft_wrap=True)


@app.command()
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
    from finetune.models.generation import Generation

    generation = Generation(thinking, max_new_tokens, temperature)
    below = _base_weights(base_weights, ("packed", "original"))
    frozen: Any = {"dtype": _dtype(dtype), "base": base, "base_weights": below}
    pipeline.chat(path, generation, prompt, system=system, **frozen, console=_console())


@app.command(name="eval")
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

    below = _base_weights(base_weights, ("packed", "original"))
    frozen: Any = {"dtype": _dtype(dtype), "base": base, "base_weights": below}
    result = pipeline.evaluate(path, data, template=template, by=by, limit=limit, **frozen)
    if as_json:
        _print_json(result.to_dict())
    else:
        _console().print(result.render())


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if value is None or value in ([], {}, ()):
            continue
        table.add_row(name.replace("_", " "), _plain(value))
    _console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        known = {key: item for key, item in value.items() if item is not None and item not in ([], ())}
        return ", ".join(f"{key} {_plain(item)}" for key, item in known.items())
    if isinstance(value, list | tuple):
        separator = "\n" if any(isinstance(item, dict) for item in value) else ", "
        return separator.join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _base_weights(text: str, allowed: tuple[str, str] = ("original", "dequantized")) -> str:
    if text not in allowed:
        raise typer.BadParameter(f"{text!r} is neither {' nor '.join(allowed)}", param_hint="--base-weights")
    return text


def _dtype(text: str | None) -> str | None:
    allowed = ("bf16", "fp16", "fp32")
    if text is not None and text not in allowed:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(allowed)}", param_hint="--dtype")
    return text
