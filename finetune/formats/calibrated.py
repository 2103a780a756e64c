"""Weights in 4 bits, rounded so that the model answers the user's own rows as before, in the files of GPTQ and AWQ.

AutoRound finds the rounding, in a process of its own. What it gives back is believed only after it was compared with
the model: every matrix that config.json calls for, of the right shape, close to the weight it stands for. Everything
else (router, embeddings, norms, head) is written from the model itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune.architecture.names import HEAD, ROUTER, is_router
from finetune.config.schema import DataSection
from finetune.data.dataset import prepare
from finetune.errors import ExportError, Problem, UserError, first_of
from finetune.formats.format import ModelSource, Planned
from finetune.formats.model_files import keep, plan_folder, quantized_config, refuse_quantized
from finetune.formats.packed4 import packed_shapes, unpack
from finetune.io.pieces import copy
from finetune.io.safetensors_file import Tensor
from finetune.models.checkpoint import Checkpoint
from finetune.models.loading import load_tokenizer
from finetune.models.tensor_file import TensorFile

BITS = 4
_FAR = 0.5  # of a weight's norm; rounding to nearest is off by 0.05 to 0.15
_TOLD = 30
_SHOWN = 8
_WHOLE_ROWS = 2**30
_HINT = "do not use the result; report this with the version of auto-round"


@dataclass(frozen=True)
class Calibration:
    """What the rounding is fitted to.

    data: files with rows.  template: their data template.  blocks: of `length` tokens each.  steps: of AutoRound's
    search per layer; 0 is rounding to nearest.
    """

    data: Sequence[str] = ()
    template: str = "chat"
    blocks: int = 128
    length: int = 512
    steps: int = 200


@dataclass(frozen=True)
class Rounded:
    """What AutoRound wrote, checked. error: largest |rounded - weight| / |weight| of any matrix."""

    to: str
    group: int
    files: dict[str, TensorFile] = field(repr=False)
    error: float

    def tensors(self, source: Checkpoint, linears: dict[str, tuple[int, int]]) -> list[list[Tensor]]:
        """Groups of tensors in the order of the source: these matrices, and the rest of the source in float16."""
        return [self._packed(name, linears[name]) if name in linears else keep(source, name, "F16")
                for name in source.weights]  # fmt: skip

    def config(self, source: Checkpoint) -> dict[str, Any]:
        """What config.json gets as quantization_config."""
        modules = [name.removesuffix(".weight") for name in source.weights]
        routers = [module for module in modules if is_router(module)]
        common = {"bits": BITS, "group_size": self.group, "quant_method": self.to}
        if self.to == "awq":
            return {**common, "version": "gemm", "zero_point": True, "modules_to_not_convert": [HEAD, *routers]}
        excluded: dict[str, Any] = {"dynamic": {rf"-:.*\.{re.escape(ROUTER)}$": {}}} if routers else {}
        return {**common, "sym": True, "desc_act": False, HEAD: False, "checkpoint_format": "gptq", **excluded}

    def _packed(self, name: str, shape: tuple[int, int]) -> list[Tensor]:
        stem = name.removesuffix("weight")
        return [
            Tensor(stem + ending, dtype, size, partial(copy, self.files[stem + ending], stem + ending))
            for ending, (dtype, size) in packed_shapes(self.to, shape, self.group).items()
        ]


def plan_calibrated(model: ModelSource, to: str, group: int, calibration: Calibration, max_shard_bytes: int) -> Planned:
    """Finds the rounding before anything is planned; what it took lies beside the output until the end."""
    source, linears = model.checkpoint, model.linears
    refuse_quantized(source)
    check_fit(to, linears, group)
    work = Path(model.held.enter_context(workplace(model.output)))
    rounded = round_weights(source, to, linears, group, calibration, work)
    config = quantized_config(source, rounded.config(source))
    facts = {"quantized matrices": len(linears), "largest error": f"{rounded.error:.1%}"}
    tensors = rounded.tensors(source, linears)
    return plan_folder(source, tensors, max_shard_bytes, dtype="float16", config=config, facts=facts)


def check_fit(to: str, linears: dict[str, tuple[int, int]], group: int) -> None:
    """Raises UserError, before anything is computed, for rows that are no whole number of groups."""
    odd = {shape for shape in linears.values() if shape[1] % group or shape[0] % 8}
    if odd or group % 8:
        what = f"rows of {', '.join(str(width) for _, width in sorted(odd))} are no whole number of groups"
        raise UserError(Problem(f"--to {to}", what, "choose a group that divides the rows with --group", group))


def round_weights(
    source: Checkpoint, to: str, linears: dict[str, tuple[int, int]], group: int, calibration: Calibration, work: Path
) -> Rounded:
    """Lets AutoRound find the rounding, and checks what it wrote in `work`.

    Raises UserError when the rows are too few, ExportError when AutoRound fails or gives something else than asked.
    """
    save_file({"input_ids": calibration_tokens(source, calibration)}, work / "tokens.safetensors")
    job = {
        "model": str(source.path),
        "tokens": str(work / "tokens.safetensors"),
        "output": str(work / "rounded"),
        "to": to,
        "group": group,
        "steps": calibration.steps,
    }
    (work / "job.json").write_text(json.dumps(job))
    run_job(work / "job.json")
    return check_rounded(source, to, linears, group, work / "rounded")


def run_job(job: Path) -> None:
    """Runs AutoRound on what the file says. Raises ExportError with its last lines when it fails."""
    command = [sys.executable, "-m", "finetune.formats.auto_round_job", str(job)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        last_lines = "\n".join((ran.stdout + ran.stderr).splitlines()[-_TOLD:])
        hint = f"its last lines:\n{last_lines}"
        raise ExportError(Problem("auto-round", f"failed with exit code {ran.returncode}", hint))


def calibration_tokens(source: Checkpoint, calibration: Calibration) -> torch.Tensor:
    """Rows of the files through the training template, one behind the other, as (blocks, length) int32."""
    section = DataSection(
        train=tuple({"path": path} for path in calibration.data),  # type: ignore[misc]
        template=calibration.template,
        max_length=_WHOLE_ROWS,
        packing=False,
    )
    rows = prepare(section, load_tokenizer(str(source.path)), seed=0).train
    wanted = calibration.blocks * calibration.length
    ids: list[int] = []
    for row in rows:
        ids.extend(row["input_ids"])
        if len(ids) >= wanted:
            break
    blocks = min(len(ids), wanted) // calibration.length
    if not blocks:
        hint = "add rows, or shorten the blocks with --calibration-length"
        what = f"hold {len(ids)} tokens, less than one block of {calibration.length}"
        raise UserError(Problem(", ".join(calibration.data), what, hint))
    return torch.tensor(ids[: blocks * calibration.length], dtype=torch.int32).view(blocks, -1)


def check_rounded(
    source: Checkpoint, to: str, linears: dict[str, tuple[int, int]], group: int, folder: Path
) -> Rounded:
    """Reads what AutoRound wrote and compares it with the model. Raises ExportError with every difference."""
    files: dict[str, TensorFile] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        opened = TensorFile.open(path)
        files |= dict.fromkeys(opened.tensors, opened)
    wanted = {
        name.removesuffix("weight") + ending: form
        for name, shape in linears.items()
        for ending, form in packed_shapes(to, shape, group).items()
    }
    problems = []
    for name, form in wanted.items():
        found = files[name].tensors[name] if name in files else None
        if found is None or (found.dtype, found.shape) != form:
            got = found and [found.dtype, *found.shape]
            problems.append(Problem(name, f"is not {form[0]} of {list(form[1])} in what AutoRound wrote", _HINT, got))
    done = sum(name.endswith(".qweight") for name in files)
    if done != len(linears):
        what = f"AutoRound quantized {done} matrices, and config.json calls for {len(linears)}"
        problems.insert(0, Problem(f"--to {to}", what, _HINT))
    left = files.keys() - wanted.keys()
    problems += [Problem(name, "is not in the model", _HINT) for name in sorted(left - set(source.weights))]
    if problems:
        raise ExportError(*first_of(problems, _SHOWN, f"--to {to}"))
    for name in sorted(left):  # nothing else may have been changed to make the rounding fit
        if not torch.allclose(files[name].read(name).float(), source.read_float(name), rtol=2**-7, atol=1e-6):
            raise ExportError(Problem(name, "was changed by AutoRound", _HINT))
    error = max(_error(source, to, name, files, group) for name in linears)
    return Rounded(to, group, files, error)


def _error(source: Checkpoint, to: str, name: str, files: dict[str, TensorFile], group: int) -> float:
    stem = name.removesuffix("weight")
    endings = ("qweight", "qzeros", "scales", "g_idx") if to == "gptq" else ("qweight", "qzeros", "scales")
    found = unpack(to, {ending: files[stem + ending].read(stem + ending) for ending in endings}, group)
    weight = source.read_float(name)
    error = ((found - weight).norm() / weight.norm().clamp(min=1e-12)).item()
    if not error <= _FAR:
        raise ExportError(Problem(name, "is far from the weight it stands for (share of its norm)", _HINT, error))
    return error


def workplace(output: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside the output for what AutoRound reads and writes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
