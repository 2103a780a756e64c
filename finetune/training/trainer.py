"""TRL's trainer without waits for the device between logs, and with the losses of routers where a recipe has any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from trl import SFTTrainer

from finetune.training.objectives.objective import Objective
from finetune.training.order import BlanksLast
from finetune.training.router_losses import Batch, RouterLosses, RouterLossLog


class StepTrainer(SFTTrainer):
    """TRL's trainer, whose steps read nothing to the host; what is logged is summed on the device until then.

    TRL's own figures of entropy and accuracy, which nothing here logs, are not computed.
    """

    objective: Objective
    """What the loss of a micro-batch is."""

    router: RouterLosses | None = None
    """Losses to add to the trainer's own; none when None."""

    blanks = 0
    """Rows at the end of the training rows that carry no loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is ours, whatever the forward of a model says about its own
        self.router_log = RouterLossLog()
        self._new_tokens: Tensor | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """That of transformers, or one that takes blank rows last."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self.blanks:
            return super()._get_train_sampler(train_dataset)
        return BlanksLast(len(rows) - self.blanks, self.blanks, self.args.data_seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The rate of each step; transformers' own begins with a step at zero, so ours begins with its second one.

        Warm-up and training are a step longer there, which leaves the rates after warm-up as they are.
        """
        warmup = self.args.warmup_steps
        self.args.warmup_steps = warmup + 1
        begun = super().create_scheduler(num_training_steps + 1, optimizer)
        self.args.warmup_steps = warmup
        rates: list[Callable[[int], float]] = [partial(_one_later, rate) for rate in begun.lr_lambdas]
        self.lr_scheduler: Any = LambdaLR(begun.optimizer, rates)
        return self.lr_scheduler

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of a row that reach the collator."""
        self._signature_columns = list(self.objective.columns)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step, and how many labels or pairs the loss is a mean over."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.router is not None and batches:
            self._whole = self.router.whole(batches)
            self.router_log.steps += 1
        if batches and (units := self.objective.units(batches)) is not None:
            num_items = self.accelerator.reduce(torch.tensor(units, device=self.accelerator.device), "sum")
        return batches, num_items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's row, with input tokens so far and the routers' losses by name."""
        if self.router is not None and "loss" in logs:
            logs = {**logs, **self.router_log.take(self.accelerator)}
        if "loss" in logs:
            logs = {**logs, **self.objective.figures(self.accelerator)}
        if self._new_tokens is not None:
            total: Tensor = self.accelerator.reduce(self._new_tokens, "sum")
            self._total_train_tokens += int(total)
            self._new_tokens = None
        if self.model.training:
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The loss of one micro-batch, and in training its part of the routers' losses."""
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        reference, router = self.objective.reference(inputs), self.router
        if router is None:
            return self._own_loss(model, inputs, reference, num_items_in_batch)
        base = router.base_logits(inputs)
        with router.listening() as logits:
            loss = self._own_loss(model, inputs, reference, num_items_in_batch)
        parts = router.parts(logits, base, inputs, self._whole)
        self.router_log.add(parts)
        return loss + router.weighted(parts) * self.accelerator.num_processes  # gradients are averaged over processes

    def _own_loss(self, model: Any, inputs: Batch, reference: Any, num_items: Tensor | None) -> Tensor:
        """The objective's loss per label, or pair, of the whole batch."""
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        new = torch.full((), ids.numel(), device=ids.device) if mask is None else mask.sum()
        self._new_tokens = new if self._new_tokens is None else self._new_tokens + new
        assert num_items is not None, "the trainer counts what its loss is a mean over"
        loss = self.objective.loss(model, inputs, reference) / torch.as_tensor(num_items).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return loss


def _one_later(rate: Callable[[int], float], step: int) -> float:
    return rate(step + 1)
