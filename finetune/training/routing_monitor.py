"""The router under watch while a run trains: rows in metrics.jsonl, and warnings with advice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import reduce
from peft import PeftModel
from transformers import TrainerCallback

from finetune.models.text_model import text_config
from finetune.routing.collect import Row, take_sample
from finetune.routing.plan import ExpertPlan
from finetune.routing.watch import LoadCounter, Look, Probe, overlap
from finetune.training.callbacks import Metrics

PROBE_TOKENS = 1024
LOOKS = 20
LEAST_PROBE = 64
SHARE = 0.01
"""Most that looks may cost of what training costs, counted in tokens: a resumed run looks when the first did."""
TRAINING = 2
"""Forward passes that a trained token costs at least: one, and the gradient of inputs."""
STARTING = 4096
"""Tokens below which a forward pass takes no less time on an accelerator: reading the weights, starting kernels."""


class RoutingMonitor(TrainerCallback):
    """Looks at the router before the first step, then at most twenty times, and after the last step.

    rows: training rows; the first ones are what drift is measured on.
    trained_tokens: of the whole run on one device. Where they are few, looks are fewer and the probe is smaller.

    Each kind of trouble is reported once, in the `warnings` of a row.
    """

    def __init__(self, model: PeftModel, rows: Sequence[Row], metrics: Metrics, *, trained_tokens: int) -> None:
        self._model, self._metrics = model, metrics
        base: Any = model.get_base_model()
        self._counter = LoadCounter(base.model, text_config(base).num_experts)
        starting = STARTING if torch.accelerator.is_available() else 0
        self._looks, probe_tokens = plan_looks(trained_tokens, starting)
        self._probe = Probe(base.model, take_sample(rows, probe_tokens), text_config(base).num_experts)
        self._hooks = ExitStack()
        self._reported: set[str] = set()

    @property
    def _plan(self) -> ExpertPlan | None:
        """The experts that train now; None for all."""
        plan: ExpertPlan | None = getattr(self._model.peft_config[self._model.active_adapter], "expert_plan", None)
        return plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See what the base model does with the probe, and start to count."""
        with self._model.disable_adapter():
            self._base_choices = self._probe.choices()
        load = self._probe.load(self._base_choices)
        self._base = Look(tuple(self._counter.layers), load, load, [1.0] * len(load))
        self._hooks.enter_context(self._counter.listening())
        if state.global_step == 0:
            self._metrics.write({"step": 0, **self._base.to_row(self._plan)})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look when it is time."""
        every = -(-state.max_steps // self._looks)
        if state.global_step % every and state.global_step < state.max_steps:
            return
        choices = self._probe.choices()
        load_LE = reduce(self._counter.take(), "sum").cpu().numpy()  # over all processes
        look = Look(self._base.layers, load_LE, self._probe.load(choices), overlap(choices, self._base_choices))
        row = {"step": state.global_step, **look.to_row(self._plan)}
        news = {kind: text for kind, text in look.warnings(self._base).items() if kind not in self._reported}
        if news:
            row["warnings"] = list(news.values())
            self._reported.update(news)
        self._metrics.write(row)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._hooks.close()


def plan_looks(trained_tokens: int, starting: int = 0) -> tuple[int, int]:
    """How often to look while a run trains, the last step included, and at how many tokens.

    Together with the look before the first step they cost SHARE of the run's training, as far as two looks can.
    starting: tokens that a pass costs at least, however few it reads.
    """
    budget = int(SHARE * TRAINING * trained_tokens)
    looks = min(LOOKS, max(1, budget // max(PROBE_TOKENS // 4, starting) - 1))
    return looks, min(PROBE_TOKENS, max(LEAST_PROBE, budget // (looks + 1)))
