"""Commands that write weights: quantize, merge and verify, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli.options import (
    AdapterPath,
    AdapterPaths,
    AsJson,
    BasePath,
    BaseWeights,
    Shares,
    WeightType,
    parse_shares,
)
from finetune.cli.printing import open_console, print_json


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
    from finetune.export.show import size_text

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
    base_weights: BaseWeights = "original",
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
        base_weights=base_weights,
        resume=resume,
        console=open_console(stderr=True),
    )
    if not as_json:
        open_console().print(report)
    proof = None
    if check:
        proof = pipeline.verify(adapters, output, base=base, weights=shares, base_weights=base_weights)
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
    base_weights: BaseWeights = "original",
    as_json: AsJson = False,
) -> None:
    """Prove that merged = base + adapter."""
    from finetune import pipeline

    report = pipeline.verify(
        adapters, merged, base=base, weights=parse_shares(weights), base_weights=base_weights, prompts=prompts or None
    )
    if as_json:
        print_json(report.to_dict())
    else:
        open_console().print(report)


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

    calibration = Calibration(data=tuple(data or ()), template=template, blocks=blocks, length=length, steps=steps)
    options = ModelOptions(
        type=gguf_type,
        dtype=dtype,
        max_shard_bytes=int(shard_gb * 1e9),
        group=group,
        thinking=thinking,
        calibration=calibration,
    )
    console = open_console(stderr=True)
    report = pipeline.export(source, output, to, base=base, options=options, resume=resume, console=console)
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
