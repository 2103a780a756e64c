"""`finetune export`: an adapter or a model as another program reads it, and a note on how to start that."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from finetune.adapters.files import adapter_folder
from finetune.adapters.stock_config import ADAPTER_CONFIG
from finetune.architecture.registry import FAMILIES
from finetune.architecture.shape import ModelShape
from finetune.errors import Problem, UserError
from finetune.formats.factors import Factors
from finetune.formats.format import AdapterFormat, ExportedAdapter, Format, ModelFormat, ModelSource, Planned
from finetune.formats.registry import make_format
from finetune.formats.serving_note import NOTE, Use
from finetune.io.folder import Progress, Work, check_output, describe_job, write_folder
from finetune.io.sizes import size_text
from finetune.merging.plan import check_model, plan_merge, refuse_packed, taught_ends
from finetune.models.checkpoint import Checkpoint, find_checkpoint
from finetune.report.tables import Shown, warnings


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


@dataclass(frozen=True)
class _Job:
    """What is about to be written. folders: all that it is made from.  base: the checkpoint among them."""

    planned: Planned
    note: str
    source: Path
    base: Checkpoint
    folders: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def export(
    source: str | Path,
    output: str | Path,
    to: Format | str,
    *,
    base: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes an adapter or a model as another program reads it; one piece of one tensor is in memory at a time.

    source: an adapter folder, ours or PEFT's, or a model, as the format calls for.  output: a folder to make.
    to: a format with its options, or the name of one.  base: of an adapter, where the adapter says it is when None.
    resume: go on where a killed export of the same inputs stopped.
    Raises AdapterError, ModelError or UserError, before the first byte is written, if anything does not fit.
    """
    started = time.perf_counter()
    to = make_format(to) if isinstance(to, str) else to
    output = Path(output).absolute()
    _check(to, source, base, resume=resume)
    with ExitStack() as held:
        if isinstance(to, AdapterFormat):
            job = _plan_adapter(to, source, output, base)
        else:
            assert isinstance(to, ModelFormat)
            job = _plan_model(to, source, output, held)
        told = describe_job("export", to.name, asdict(to), folders=job.folders)
        side = {**job.planned.side, NOTE: job.note.encode()}
        write_folder(Work(output, job.base, job.planned.files, side, told, resume), progress)
    return ExportReport(
        output=output,
        source=job.source,
        to=to.name,
        dtype=to.stored,
        files={path.name: path.stat().st_size for path in sorted(output.iterdir())},
        tensors=sum(len(file.outputs) for file in job.planned.files),
        facts=job.planned.facts,
        elapsed_s=time.perf_counter() - started,
        warnings=job.warnings,
    )


def _check(to: Format, source: str | Path, base: str | Path | None, *, resume: bool) -> None:
    problems = to.problems()
    if isinstance(to, ModelFormat):
        if base is not None:
            what, hint = f"has no meaning for {to.name}", "leave it out: only an adapter has a base"
            problems.append(Problem("--base", what, hint))
        if (adapter_folder(source) / ADAPTER_CONFIG).is_file():
            hint = f"merge it first: finetune merge {source} --output MERGED, then export MERGED"
            problems.append(Problem(str(source), f"is an adapter, and --to {to.name} writes whole models", hint))
    if resume and not to.resumes:
        hint = "leave it out: the rounding is found anew"
        problems.append(Problem("--resume", f"has no meaning for {to.name}", hint))
    if problems:
        raise UserError(*problems)


def _check_family(shape: ModelShape, to: str, where: Path) -> None:
    """Raises UserError when we do not know how the runtime that a format is for lays out this family."""
    family = FAMILIES[shape.model_type]
    if family.exports is not None and to not in family.exports:
        what = f"is of the family {family.title}, whose layout in {to} is not known here"
        hint = (
            f"use --to {' or '.join(family.exports)}, or merge: runtimes that know the family read merged checkpoints"
        )
        raise UserError(Problem(str(where), what, hint))


def _plan_adapter(to: AdapterFormat, source: str | Path, output: Path, base: str | Path | None) -> _Job:
    plan = plan_merge(source, base)
    _check_family(plan.shape, to.name, plan.base.path)
    files = plan.adapters[0]
    thinking = (files.sidecar or {}).get("thinking") if to.thinking is None else to.thinking
    use = Use.of(plan.base.path, thinking, taught_ends(plan))
    planned = to.plan(Factors.of(plan))
    named, rank = files.base_model or str(plan.base.path), planned.facts["rank"]
    note = to.note(ExportedAdapter(output, named, plan.base.path, rank, plan.rope_scaling), use)
    return _Job(planned, note, plan.paths[0], plan.base, (plan.base.path, *plan.paths), plan.warnings)


def _plan_model(to: ModelFormat, source: str | Path, output: Path, held: ExitStack) -> _Job:
    checkpoint = Checkpoint.open(find_checkpoint(source))
    refuse_packed(checkpoint, "export that model, or merge an adapter into it and export the result")
    shape = check_model(checkpoint)
    _check_family(shape, to.name, checkpoint.path)
    check_output(output, checkpoint)
    planned = to.plan(ModelSource(checkpoint, shape.linears(), output, held))
    note = to.note(output, Use.of(checkpoint.path, to.thinking))
    return _Job(planned, note, checkpoint.path, checkpoint, (checkpoint.path,))
