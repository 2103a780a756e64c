"""Models in 8 and 4 bits, rounded to nearest without data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.formats.format import ModelFormat, ModelSource, Planned, Sharded
from finetune.formats.option import option

if TYPE_CHECKING:
    from finetune.formats.quantized import Dialect

GROUP = 128


@dataclass(frozen=True, kw_only=True)
class _Rounded(Sharded, ModelFormat):
    @abstractmethod
    def dialect(self) -> Dialect:
        """The tensors that stand for a weight, and what config.json says of them."""

    def plan(self, model: ModelSource) -> Planned:
        """Every linear layer that config.json calls for in the dialect, the rest as it is."""
        from finetune.formats.model_files import plan_folder, quantized_config, refuse_quantized
        from finetune.formats.quantized import plan_quantized

        dialect, source = self.dialect(), model.checkpoint
        refuse_quantized(source)
        tensors = plan_quantized(source, dialect, model.linears)
        config = quantized_config(source, dialect.config)
        facts = {"quantized matrices": len(model.linears)}
        return plan_folder(source, tensors, self.max_shard_bytes, config=config, facts=facts)


@dataclass(frozen=True, kw_only=True)
class Fp8(_Rounded):
    """Blocks of 128 x 128, as the hub's own FP8 checkpoints."""

    name = "fp8"
    about = "vLLM, SGLang, transformers: FP8 as the hub's own checkpoints"
    remarks = (
        "Weights are FP8 in blocks of 128 x 128. With tensor parallelism, expert width / GPUs must be a multiple "
        "of 128: at most 2 GPUs for Qwen3-30B-A3B (768); more with expert parallelism.\n\n"
    )

    def dialect(self) -> Dialect:
        """The hub's."""
        from finetune.formats.quantized import fp8_blocks

        return fp8_blocks()


@dataclass(frozen=True, kw_only=True)
class Fp8CompressedTensors(_Rounded):
    """One scale per row."""

    name = "fp8-ct"
    about = "vLLM, transformers: FP8 of compressed-tensors"

    def dialect(self) -> Dialect:
        """compressed-tensors, float-quantized."""
        from finetune.formats.quantized import fp8_rows

        return fp8_rows()


@dataclass(frozen=True, kw_only=True)
class Int4(_Rounded):
    """One scale for a group of a row."""

    name = "int4"
    about = "vLLM, transformers: 4 bits of compressed-tensors"

    group: int = option(GROUP, "weights per scale", least=8)

    def dialect(self) -> Dialect:
        """compressed-tensors, pack-quantized."""
        from finetune.formats.quantized import int4_groups

        return int4_groups(self.group)
