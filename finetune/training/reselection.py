"""Experts chosen anew while a run trains: those that the rows have come to use instead of those they no longer do.

As many experts of a layer train as before, in the same memory. One that leaves goes back to the base's weights; one
that comes starts as at the beginning of a run. Both are seldom used, so the step between costs little, and a
candidate has to beat the expert it replaces by a margin, so that near ties do not flicker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from finetune.adapters.delta import Delta
from finetune.adapters.expert_factors import ExpertFactors
from finetune.adapters.factor import Factor
from finetune.architecture.names import layer_index
from finetune.config.schema import Reselect
from finetune.models.files import write_json_atomic
from finetune.models.text_model import text_config
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import load_share
from finetune.routing.select import reselect
from finetune.routing.watch import LoadCounter
from finetune.training.callbacks import Metrics
from finetune.training.processes import is_main_process

COUNTS = "expert_counts.json"
"""In a checkpoint: tokens per expert since experts were last chosen."""
SECOND_MOMENTS = ("exp_avg_sq", "state2")
"""As torch's AdamW and bitsandbytes' name them."""


class Reselection(TrainerCallback):
    """Chooses experts anew every `section.every` steps, by the tokens they got in the training steps since.

    model: its experts all have one rank. checkpoint: what the run resumes from, None at its start.
    """

    def __init__(
        self, model: PeftModel, section: Reselect, metrics: Metrics, *, seed: int, checkpoint: Path | None
    ) -> None:
        self._model, self._section, self._metrics, self._seed = model, section, metrics, seed
        assert current_plan(model).ranks_by_layer is None, "experts of different ranks cannot be moved"
        base: Any = model.get_base_model()
        self._counter = LoadCounter(base.model, text_config(base).num_experts)
        self._carried_LE = self._counter.take()
        if checkpoint is not None and is_main_process():
            counts = json.loads((checkpoint / COUNTS).read_text(encoding="utf-8"))
            self._carried_LE += torch.tensor(counts, device=self._carried_LE.device)
        self._hooks = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to count."""
        self._hooks.enter_context(self._counter.listening())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose when it is time; never after the last step, where what comes could not learn."""
        if state.global_step % self._section.every or state.global_step >= state.max_steps:
            return
        share_LE = load_share(self._counts(keep=False).cpu().numpy())
        before = current_plan(self._model)
        after = reselect(before, share_LE, tuple(self._counter.layers), self._section.margin)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + state.global_step) % 2**63)
        move_experts_(self._model, after, kwargs["optimizer"], generator)
        left = {
            str(layer): sorted(set(experts) - set(after.experts_by_layer[layer]))
            for layer, experts in before.experts_by_layer.items()
        }
        came = {
            str(layer): sorted(set(experts) - set(before.experts_by_layer[layer]))
            for layer, experts in after.experts_by_layer.items()
        }
        swapped = sum(map(len, came.values()))
        row: dict[str, Any] = {"step": state.global_step, "experts_swapped": swapped}
        if swapped:
            row["reselected"] = {
                layer: {"left": left[layer], "came": experts} for layer, experts in came.items() if experts
            }
        self._metrics.write(row)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the counts into the checkpoint."""
        counts_LE = self._counts(keep=True)
        if is_main_process():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json_atomic(folder / COUNTS, counts_LE.tolist())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._hooks.close()

    def _counts(self, *, keep: bool) -> Tensor:
        """Tokens of all processes since the last choice, (L, E); kept for the next call or not."""
        self._carried_LE += self._counter.take()
        total_LE: Tensor = reduce(self._carried_LE.clone(), "sum")
        if not keep:
            self._carried_LE.zero_()
        return total_LE


def current_plan(model: PeftModel) -> ExpertPlan:
    """The experts that train now."""
    config: Any = model.peft_config[model.active_adapter]
    plan: ExpertPlan = config.expert_plan
    return plan


@torch.no_grad()
def move_experts_(model: PeftModel, plan: ExpertPlan, optimizer: Any, generator: torch.Generator) -> None:
    """Let the experts of `plan` train in the slots there are; those that stay keep values and optimizer state.

    For those that come, AdamW's first moment is zero and its second the mean over those that stay: zeros there would
    make the first steps several times too large, for its bias correction is long over.
    generator: of the start of A, on the CPU.
    """
    config: Any = model.peft_config[model.active_adapter]
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, ExpertFactors):
            continue
        experts = plan.experts_by_layer[layer_index(name)]
        for holder in (module.lora_A, module.lora_B, module.lora_delta):
            if model.active_adapter in holder:
                part: Factor | Delta = holder[model.active_adapter]
                source = part.move_(experts, generator)
                move_state_(optimizer.state[part.weight], source)
    config.expert_plan = plan


def move_state_(state: dict[str, Any], source: Sequence[int]) -> None:
    """Moments of slots follow them; -1 in `source` is a slot without a past."""
    index = torch.tensor(source)
    for name, values in state.items():
        if not isinstance(values, Tensor) or values.ndim != 3:
            continue  # the count of steps
        moved = values[index.clamp(min=0).to(values.device)]
        fresh = index < 0
        if fresh.any():
            stays = values[index[~fresh].to(values.device)]
            moved[fresh] = (stays if len(stays) else values).mean(0) if name in SECOND_MOMENTS else 0.0
        values.copy_(moved)
