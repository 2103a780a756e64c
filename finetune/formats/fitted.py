"""Models in 4 bits whose rounding is fitted to the user's own rows, in the files of GPTQ and AWQ."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.errors import Problem
from finetune.formats.format import ModelFormat, ModelSource, Planned, Sharded
from finetune.formats.option import Package, option
from finetune.formats.rounded import GROUP


def _remarks(files: str) -> str:
    return (
        f"Weights are 4-bit in {files}'s files, fitted to your rows; router, embeddings, norms and lm_head are "
        "float16. vLLM runs experts in this form on GPUs only.\n\n"
    )


@dataclass(frozen=True, kw_only=True)
class Gptq(Sharded, ModelFormat):
    """GPTQ's files. data: files with rows, of which `calibration_blocks` of `calibration_length` tokens are made."""

    name = "gptq"
    about = "vLLM on GPUs: GPTQ's files, fitted to your rows"
    remarks = _remarks("GPTQ")
    resumes = False
    package = Package("auto-round", "pip install 'finetune-moe[quant]'")

    group: int = option(GROUP, "weights per scale", least=8)
    data: tuple[str, ...] = option((), "file with rows to fit to; may be repeated")
    template: str = option("chat", "data template of the files")
    calibration_blocks: int = option(128, "blocks of tokens", least=1)
    calibration_length: int = option(512, "tokens of a block", least=1)
    calibration_steps: int = option(200, "search steps per layer; 0 rounds to nearest", least=0)

    def problems(self) -> list[Problem]:
        """No rows as well."""
        found = super().problems()
        if not self.data:
            hint = "name the training file; its rows decide which rounding errors matter"
            found.append(Problem("--data", f"is needed with --to {self.name}", hint))
        return found

    def plan(self, model: ModelSource) -> Planned:
        """The rounding is found here, before the first byte is written."""
        from finetune.formats.calibrated import Calibration, plan_calibrated

        calibration = Calibration(
            self.data, self.template, self.calibration_blocks, self.calibration_length, self.calibration_steps
        )
        return plan_calibrated(model, self.name, self.group, calibration, self.max_shard_bytes)


@dataclass(frozen=True, kw_only=True)
class Awq(Gptq):
    """AWQ's files."""

    name = "awq"
    about = "vLLM on GPUs: AWQ's files, fitted to your rows"
    remarks = _remarks("AWQ")
