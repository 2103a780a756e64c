"""Adapters for PEFT itself: expert banks as PEFT packs them, or a pair for every expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.formats.format import AdapterFormat, ExportedAdapter, Planned
from finetune.formats.serving_note import Use

if TYPE_CHECKING:
    from finetune.formats.factors import Factors


@dataclass(frozen=True, kw_only=True)
class Peft(AdapterFormat):
    """Fused banks, PEFT 0.19 and later."""

    name = "peft"
    about = "transformers + PEFT, expert banks fused"
    tell_stops = "give `eos_token_id={ids}` to `generate`"

    def plan(self, factors: Factors) -> Planned:
        """PEFT's packing of expert banks, plain pairs for the rest."""
        from finetune.formats.peft_files import fused, plan_weights

        return plan_weights(*fused(factors, self.storage), {"rank": factors.max_rank})

    def start(self, adapter: ExportedAdapter, use: Use) -> str:
        """Python, with the base in transformers."""
        return (
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{adapter.base}", dtype="auto")\n'
            f'model = PeftModel.from_pretrained(model, "{adapter.output}")\n```\n'
        )

    def about_use(self, use: Use) -> str:
        """What to call the chat template with."""
        return use.told(f"call `tokenizer.apply_chat_template` with `enable_thinking={use.thinking}`")


@dataclass(frozen=True, kw_only=True)
class PeftPerExpert(Peft):
    """A pair for each expert and projection."""

    name = "peft-per-expert"
    about = "transformers + PEFT, a pair per expert"

    def plan(self, factors: Factors) -> Planned:
        """Every rank padded to the largest."""
        from finetune.formats.peft_files import per_expert, plan_weights

        facts = {"rank": factors.max_rank, "zero-filled experts": factors.zero_filled}
        return plan_weights(*per_expert(factors, self.storage, served=False), facts)
