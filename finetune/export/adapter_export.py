"""`finetune export ADAPTER`: the adapter as the program that will run it wants it, and a note on how to start that."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.text import Text

from finetune.architecture.names import expert_matrix
from finetune.errors import Problem, UserError
from finetune.export import gguf_lora, peft_files
from finetune.export.factors import Factors
from finetune.export.folder import Progress, Work, describe_job, write_folder
from finetune.export.plan import check_format, plan_merge, taught_ends
from finetune.export.safetensors_file import plan_file
from finetune.export.serving_note import NOTE, Use, adapter_note
from finetune.export.show import Shown, size_text, warnings
from finetune.export.stream import OutputFile

AdapterFormat = Literal["peft", "peft-per-expert", "vllm", "sglang", "gguf-lora"]
ADAPTER_FORMATS: tuple[AdapterFormat, ...] = ("peft", "peft-per-expert", "vllm", "sglang", "gguf-lora")
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportReport(Shown):
    """What an export wrote.

    files: name -> bytes.  tensors: how many were written.  facts: what the program that reads it should know.
    """

    output: Path
    source: Path
    to: str
    dtype: str
    files: dict[str, int]
    tensors: int
    facts: dict[str, Any]
    elapsed_s: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        paths = {"output": str(self.output), "source": str(self.source)}
        return {**asdict(self), **paths, "warnings": list(self.warnings)}

    def render(self) -> Group:
        """Where it is and how large, and how to start from there."""
        shown = size_text(sum(self.files.values()))
        told = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        lines = f"{self.output}: {self.to}, {shown}, {self.tensors:,} tensors in {self.dtype}"
        text = f"{lines}; {told}" if told else lines
        return Group(Text(text), Text(f"how to serve it: {self.output / NOTE}"), *warnings(self.warnings))


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    to: AdapterFormat,
    *,
    base: str | Path | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    thinking: bool | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes the adapter in another layout; the change it makes to the base stays the same.

    adapter: a saved adapter, ours or PEFT's.  base: as for `merge`.
    dtype: of the factors; float32 for peft and gguf-lora, bfloat16 for the servers when None.
    thinking: whether it was trained to reason before it answers, which the note beside it says how to ask for; what
    training wrote down when None.
    Raises AdapterError or ModelError when the adapter is damaged, does not fit, or cannot be said in that format.
    """
    if to not in ADAPTER_FORMATS:
        raise UserError(Problem("--to", f"is none of {', '.join(ADAPTER_FORMATS)}", "name one of them", to))
    dtype = dtype or ("bf16" if to in ("vllm", "sglang") else "fp32")
    if dtype not in DTYPES:
        raise UserError(Problem("--dtype", f"is none of {', '.join(DTYPES)}", "name one of them", dtype))
    started = time.perf_counter()
    output = Path(output).absolute()
    plan = plan_merge(adapter, base)
    check_format(plan.shape, to, plan.base.path)
    if thinking is None:
        thinking = (plan.adapters[0].sidecar or {}).get("thinking")
    use = Use.of(plan.base.path, thinking, taught_ends(plan))
    factors = Factors.of(plan)
    file, side, facts = _plan(factors, to, DTYPES[dtype])
    note = adapter_note(plan, to, output, facts, use)
    job = describe_job("export", to, dtype, thinking, folders=[plan.base.path, *plan.paths])
    write_folder(Work(output, plan.base, (file,), {**side, NOTE: note.encode()}, job, resume), progress)
    return ExportReport(
        output=output,
        source=plan.paths[0],
        to=to,
        dtype=dtype,
        files={path.name: path.stat().st_size for path in sorted(output.iterdir())},
        tensors=len(file.outputs),
        facts=facts,
        elapsed_s=time.perf_counter() - started,
        warnings=plan.warnings,
    )


def _plan(factors: Factors, to: str, dtype: str) -> tuple[OutputFile, dict[str, bytes | Path], dict[str, Any]]:
    if to == "gguf-lora":
        return gguf_lora.plan_lora(factors, dtype), {}, {"rank": factors.max_rank}
    if to == "peft":
        tensors, side = peft_files.fused(factors, dtype)
    else:
        tensors, side = peft_files.per_expert(factors, dtype, served=to != "peft-per-expert")
    rank = tensors[0].shape[0] if to in ("vllm", "sglang") else factors.max_rank
    facts = {"rank": rank, "zero-filled experts": _zero_filled(factors) if to != "peft" else None}
    told = {name: value for name, value in facts.items() if value}
    return plan_file(_WEIGHTS, tensors, {"format": "pt"}), {**side}, told


def _zero_filled(factors: Factors) -> int:
    """Experts that had no factors of their own and are written as zeros."""
    trained = {
        (matrix.bank, matrix.expert)
        for name in factors.ranks
        if (matrix := expert_matrix(name.removesuffix(".weight"))) is not None and factors.plan.read(name) is not None
    }
    return len(factors.banks) * factors.num_experts - len(trained)
