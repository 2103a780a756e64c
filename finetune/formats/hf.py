"""Models as the hub has them, in other shards or another dtype."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.formats.format import ModelFormat, ModelSource, Planned, Sharded
from finetune.formats.option import option
from finetune.io.dtypes import CONFIG_DTYPES, SAFETENSORS_DTYPES, StorageDtype


@dataclass(frozen=True, kw_only=True)
class Hf(Sharded, ModelFormat):
    """safetensors. dtype: of all weights, each one's own when None."""

    name = "hf"
    about = "anything: other shards or another dtype"

    dtype: StorageDtype | None = option(None, "bf16, fp16 or fp32")

    @property
    def stored(self) -> str:
        """The dtype."""
        return self.dtype or self.name

    def plan(self, model: ModelSource) -> Planned:
        """Every tensor, bit for bit where its dtype stays."""
        from finetune.formats.model_files import keep, plan_folder

        stored = SAFETENSORS_DTYPES[self.dtype] if self.dtype else None
        tensors = [keep(model.checkpoint, name, stored) for name in model.checkpoint.weights]
        named = CONFIG_DTYPES[self.dtype] if self.dtype else None
        return plan_folder(model.checkpoint, tensors, self.max_shard_bytes, dtype=named)
