"""GGUF, for llama.cpp: whole models, and adapters beside a base in GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import Problem
from finetune.formats.format import AdapterFormat, ExportedAdapter, ModelFormat, ModelSource, Planned
from finetune.formats.option import Package, option
from finetune.formats.serving_note import Use, shell

if TYPE_CHECKING:
    from finetune.formats.factors import Factors

PACKAGE = Package("gguf", "pip install 'finetune-moe[gguf]'")
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gguf(ModelFormat):
    """A whole model as one file. type: of its matrices, or one of llama.cpp's mixes."""

    name = "gguf"
    about = "llama.cpp"
    title = "GGUF"
    package = PACKAGE

    type: str = option("F16", f"of the matrices: {', '.join(FILE_TYPES)}")

    def problems(self) -> list[Problem]:
        """A type that cannot be written from here as well."""
        found = super().problems()
        if self.type not in FILE_TYPES:
            found.append(Problem("--type", "cannot be written", f"use one of {', '.join(FILE_TYPES)}", self.type))
        return found

    @property
    def stored(self) -> str:
        """The type."""
        return self.type

    def plan(self, model: ModelSource) -> Planned:
        """One file, and nothing beside it."""
        from finetune.formats.gguf_model import plan_model

        return Planned((plan_model(model.checkpoint, self.type, FILE_TYPES[self.type], model.output.name),), {}, {})

    def start(self, output: Path, use: Use) -> str:
        """llama-server."""
        return shell(f"llama-server -m {output}/model.gguf --jinja{use.llama}")


@dataclass(frozen=True, kw_only=True)
class GgufLora(AdapterFormat):
    """An adapter as one file."""

    name = "gguf-lora"
    about = "llama.cpp, beside the base in GGUF"
    tell_stops = 'send `"stop": {texts}` with every request'
    package = PACKAGE

    def plan(self, factors: Factors) -> Planned:
        """A pair for each tensor of the base's GGUF, all experts of a bank in one."""
        from finetune.formats.gguf_lora import plan_lora

        return Planned((plan_lora(factors, self.storage),), {}, {"rank": factors.max_rank})

    def start(self, adapter: ExportedAdapter, use: Use) -> str:
        """llama-server, and how to make the base for it."""
        command = shell(f"llama-server -m BASE.gguf --lora {adapter.output}/adapter.gguf --jinja{use.llama}")
        return f"{command}\nBASE.gguf: `finetune export {adapter.base_path} --to gguf --output BASE`\n"
