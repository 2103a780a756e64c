"""Commands that write weights: quantize, merge and verify, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.format_options import FORMAT_NAMES, format_list, takes_format_options
from finetune.cli.options import (
    AdapterPath,
    AdapterPaths,
    AsJson,
    BasePath,
    Onto,
    Shares,
    WeightType,
    parse_shares,
)
from finetune.cli.printing import open_console, print_json
from finetune.formats.registry import make_format


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model folder, or a hub name")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    scheme: Annotated[Literal["nf4", "fp8"], typer.Option("--scheme", help="storage of the weights")] = "nf4",
    block: Annotated[
        Literal[64, 128] | None, typer.Option("--block", help="weights that share a scale (nf4); 64 by default")
    ] = None,
    attention: Annotated[bool | None, typer.Option(help="linear layers of attention and dense MLPs (nf4)")] = None,
    experts: Annotated[bool, typer.Option(help="the experts")] = True,
    double: Annotated[bool, typer.Option(help="the scales too (nf4)")] = True,
    revision: Annotated[str | None, typer.Option("--revision", help="of a model on the hub")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack a model once; QLoRA runs load it in seconds."""
    from finetune import pipeline
    from finetune.config.schema import QuantizeSection
    from finetune.io.sizes import size_text

    settings = QuantizeSection(scheme=scheme, attention=attention, experts=experts, block=block, double=double)
    console = open_console(stderr=as_json)
    packed = pipeline.quantize(model, output, settings, revision=revision, console=console)
    size = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        print_json({"output": str(output), "packed_weights": packed, "bytes": size})
    else:
        lines = f"wrote {output}: {packed:,} weights packed, {size_text(size)}"
        console.print(f"{lines}\nnext: finetune train RECIPE model.path={output}", soft_wrap=True)


def merge(
    adapters: AdapterPaths,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    base: BasePath = None,
    weights: Shares = None,
    onto: Onto = "original",
    dtype: WeightType = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a merge that was killed")] = False,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="prove the result afterwards")] = True,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into their base model, and prove it."""
    from finetune import pipeline

    shares = parse_shares(weights)
    report = pipeline.merge(
        adapters,
        output,
        base=base,
        weights=shares,
        dtype=dtype,
        onto=onto,
        resume=resume,
        console=open_console(stderr=True),
    )
    if not as_json:
        open_console().print(report)
    proof = None
    if check:
        proof = pipeline.verify(adapters, output, base=base, weights=shares, onto=onto)
    if as_json:
        print_json({**report.to_dict(), "verify": proof and proof.to_dict()})
    elif proof:
        open_console().print(proof)
    else:
        open_console().print(f"\nnext: finetune verify {' '.join(map(str, adapters))} {output}", soft_wrap=True)


def verify(
    adapters: AdapterPaths,
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="the folder merge made")],
    base: BasePath = None,
    weights: Shares = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="text to compare on; may be repeated")] = None,
    onto: Onto = "original",
    as_json: AsJson = False,
) -> None:
    """Prove that merged = base + adapter."""
    from finetune import pipeline

    report = pipeline.verify(
        adapters, merged, base=base, weights=parse_shares(weights), onto=onto, prompts=prompts or None
    )
    if as_json:
        print_json(report.to_dict())
    else:
        open_console().print(report)


def _list_formats(asked: bool) -> None:
    if asked:
        typer.echo(format_list())
        raise typer.Exit


@takes_format_options
def export(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="an adapter, or a model such as merge made")
    ],
    to: Annotated[str, typer.Option("--to", help=FORMAT_NAMES)],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    base: BasePath = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an export that was killed")] = False,
    as_json: AsJson = False,
    formats: Annotated[
        bool, typer.Option("--list", callback=_list_formats, is_eager=True, help="print the formats and exit")
    ] = False,
    **options: object,
) -> None:
    """Write an adapter or a model as another program reads it."""
    from finetune import pipeline

    made = make_format(to, {name: value for name, value in options.items() if value is not None})
    report = pipeline.export(source, output, made, base=base, resume=resume, console=open_console(stderr=True))
    if as_json:
        print_json(report.to_dict())
    else:
        open_console().print(report, soft_wrap=True)


def import_adapter(
    adapter: AdapterPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    packing: Annotated[
        Literal["peft", "peft-0.18", "expert-major", "expert-major-0.18"] | None,
        typer.Option("--packing", help="how experts are packed; where the file is silent"),
    ] = None,
    base: BasePath = None,
    as_json: AsJson = False,
) -> None:
    """Take over an adapter that was made elsewhere."""
    from finetune import pipeline

    report = pipeline.import_adapter(adapter, output, packing=packing, base=base)
    if as_json:
        print_json(report.to_dict())
    else:
        open_console().print(report, soft_wrap=True)
