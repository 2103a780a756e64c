"""Adapters for vLLM and SGLang, which know one rank and one scale: the same file, another command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from finetune.formats.format import AdapterFormat, ExportedAdapter, Planned
from finetune.formats.serving_note import Use, shell
from finetune.io.dtypes import StorageDtype

if TYPE_CHECKING:
    from finetune.formats.factors import Factors


@dataclass(frozen=True, kw_only=True)
class Vllm(AdapterFormat):
    """vLLM."""

    name = "vllm"
    about = "vLLM"
    usual_dtype: ClassVar[StorageDtype] = "bf16"

    def plan(self, factors: Factors) -> Planned:
        """A pair per expert and projection, of a rank the servers accept."""
        from finetune.formats.peft_files import per_expert, plan_weights

        tensors, side = per_expert(factors, self.storage, served=True)
        facts = {"rank": tensors[0].shape[0], "zero-filled experts": factors.zero_filled}
        return plan_weights(tensors, side, facts)

    def start(self, adapter: ExportedAdapter, use: Use) -> str:
        """VLLM's server."""
        return shell(
            f"vllm serve {adapter.base} --enable-lora --max-lora-rank {adapter.rank} --lora-modules "
            f"tuned={adapter.output}{use.vllm}"
        )


@dataclass(frozen=True, kw_only=True)
class Sglang(Vllm):
    """SGLang."""

    name = "sglang"
    about = "SGLang"

    def start(self, adapter: ExportedAdapter, use: Use) -> str:
        """SGLang's server."""
        return shell(
            f"python -m sglang.launch_server --model-path {adapter.base} --enable-lora --max-lora-rank "
            f"{adapter.rank} --lora-paths tuned={adapter.output}"
        )
