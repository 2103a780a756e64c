"""`finetune export MODEL`: a checkpoint as one GGUF, in 8 or 4 bits, or in other shards."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import Problem, UserError
from finetune.export import calibrated, gguf_model, quantized
from finetune.export.adapter_export import ADAPTER_FORMATS, DTYPES, ExportReport
from finetune.export.folder import (
    CONFIG_DTYPES,
    Progress,
    Work,
    check_output,
    describe_job,
    side_contents,
    write_folder,
)
from finetune.export.plan import check_format, check_model, refuse_packed
from finetune.export.safetensors_file import MAX_SHARD_BYTES, plan_shards, split
from finetune.export.serving_note import NOTE, Use, model_note
from finetune.export.stream import OutputFile
from finetune.models.checkpoint import CONFIG, Checkpoint, find_checkpoint

ModelFormat = Literal["gguf", "fp8", "fp8-ct", "int4", "gptq", "awq", "hf"]
MODEL_FORMATS: tuple[ModelFormat, ...] = ("gguf", "fp8", "fp8-ct", "int4", "gptq", "awq", "hf")
_CALIBRATED = ("gptq", "awq")
_MIN_SHARD_BYTES = 1000
Linears = dict[str, tuple[int, int]]
Planned = tuple[list[OutputFile], dict[str, bytes | Path], dict[str, Any]]


@dataclass(frozen=True)
class ModelOptions:
    """What some formats can be told.

    type: of the matrices in a GGUF.  dtype: of all weights with hf, as stored when None.
    max_shard_bytes: of each file, but for GGUF.  group: values per scale with int4, gptq and awq.
    thinking: whether the model was trained to reason before it answers; no when None.  calibration: for gptq, awq.
    """

    type: str = "F16"
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    group: int = quantized.GROUP
    thinking: bool | None = None
    calibration: calibrated.Calibration = field(default_factory=calibrated.Calibration)

    def unused(self, to: str) -> list[Problem]:
        """One problem for each of them that is set and has no meaning for a format."""
        return [
            Problem(option, f"has no meaning for {to}", f"leave it out: it is for {', '.join(formats)}")
            for name, (option, formats) in _OPTIONS.items()
            if to not in formats and getattr(self, name) != getattr(_DEFAULTS, name)
        ]


_DEFAULTS = ModelOptions()
_OPTIONS = {  # the option of the command, and the formats that look at it
    "type": ("--type", ("gguf",)),
    "dtype": ("--dtype", (*ADAPTER_FORMATS, "hf")),
    "max_shard_bytes": ("--shard-gb", tuple(to for to in MODEL_FORMATS if to != "gguf")),
    "group": ("--group", ("int4", *_CALIBRATED)),
    "calibration": ("--data, --template, --calibration-...", _CALIBRATED),
}


def export_model(
    model: str | Path,
    output: str | Path,
    to: ModelFormat,
    options: ModelOptions | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a checkpoint, such as merge made, in another form; one piece of one tensor is in memory at a time.

    model: folder or cached hub name.  output: a folder to make.  resume: not with gptq and awq, which start over.
    Raises ModelError or UserError before the first byte is written if anything does not fit.
    """
    options = options or ModelOptions()
    _check_options(to, options, resume=resume)
    started = time.perf_counter()
    output = Path(output).absolute()
    source = Checkpoint.open(find_checkpoint(model))
    refuse_packed(source, "export that model, or merge an adapter into it and export the result")
    shape = check_model(source)
    check_format(shape, to, source.path)
    linears = shape.linears()
    check_output(output, source)
    with ExitStack() as held:
        if to in _CALIBRATED:
            files, side, facts = _plan_calibrated(source, output, to, options, linears, held)
        else:
            files, side, facts = _plan(source, output, to, options, linears)
        side[NOTE] = model_note(to, output, Use.of(source.path, options.thinking)).encode()
        job = describe_job("export", to, vars(options), folders=[source.path])
        write_folder(Work(output, source, tuple(files), side, job, resume), progress)
    return ExportReport(
        output=output,
        source=source.path,
        to=to,
        dtype=options.type if to == "gguf" else options.dtype or to,
        files={path.name: path.stat().st_size for path in sorted(output.iterdir())},
        tensors=sum(len(file.outputs) for file in files),
        facts=facts,
        elapsed_s=time.perf_counter() - started,
        warnings=(),
    )


def _check_options(to: str, options: ModelOptions, *, resume: bool) -> None:
    problems = []
    if to not in MODEL_FORMATS:
        problems.append(Problem("--to", f"is none of {', '.join(MODEL_FORMATS)}", "name one of them", to))
    if options.dtype is not None and options.dtype not in DTYPES:
        problems.append(Problem("--dtype", f"is none of {', '.join(DTYPES)}", "name one of them", options.dtype))
    if to in MODEL_FORMATS:
        problems += options.unused(to)
    if options.max_shard_bytes < _MIN_SHARD_BYTES:
        problems.append(Problem("--shard-gb", "is too small", "name a size such as 4", options.max_shard_bytes / 1e9))
    if resume and to in _CALIBRATED:
        problems.append(Problem("--resume", f"has no meaning for {to}", "leave it out: the rounding is found anew"))
    if problems:
        raise UserError(*problems)
    if to == "gguf":
        gguf_model.check_type(options.type)


def _plan(source: Checkpoint, output: Path, to: str, options: ModelOptions, linears: Linears) -> Planned:
    if to == "gguf":
        return [gguf_model.plan_model(source, options.type, output.name)], {}, {}
    if to == "hf":
        stored = DTYPES[options.dtype] if options.dtype else None
        groups = [quantized.keep(source, name, stored) for name in source.weights]
        side = side_contents(source, CONFIG_DTYPES[options.dtype] if options.dtype else None)
    else:
        dialect = {
            "fp8": quantized.fp8_blocks,
            "fp8-ct": quantized.fp8_rows,
            "int4": lambda: quantized.int4_groups(options.group),
        }[to]()
        _refuse_quantized(source)
        groups = quantized.plan_quantized(source, dialect, linears)
        side = side_contents(source, None, _config(source, dialect.config))
    files, index = plan_shards(split(groups, options.max_shard_bytes))
    side.pop(NOTE, None)
    facts: dict[str, Any] = {"shards": len(files)}
    if to != "hf":
        facts["quantized matrices"] = len(linears)
    return files, {**side, CONFIG: side[CONFIG], **index}, facts


def _plan_calibrated(
    source: Checkpoint, output: Path, to: str, options: ModelOptions, linears: Linears, held: ExitStack
) -> Planned:
    """The rounding is found here, before the first byte is written; `held` removes what it took."""
    _refuse_quantized(source)
    calibrated.check_fit(to, linears, options.group, options.calibration)
    work = Path(held.enter_context(calibrated.workplace(output)))
    rounded = calibrated.round_weights(source, to, linears, options.group, options.calibration, work)
    files, index = plan_shards(split(rounded.tensors(source, linears), options.max_shard_bytes))
    side = side_contents(source, "float16", _config(source, rounded.config(source)))
    side.pop(NOTE, None)
    facts = {"shards": len(files), "quantized matrices": len(linears), "largest error": f"{rounded.error:.1%}"}
    return files, {**side, **index}, facts


def _refuse_quantized(source: Checkpoint) -> None:
    if source.fp8_block is not None:
        hint = "export it to hf with --dtype bf16 first, or from the 16-bit model"
        raise UserError(Problem(str(source.path), "is quantized already", hint))


def _config(source: Checkpoint, quantization: dict[str, Any]) -> bytes:
    config = {**source.config, "quantization_config": quantization}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
