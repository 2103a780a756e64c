"""TRL's trainer without waits for the device between logs, and with the losses of routers where a recipe has any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from trl import SFTTrainer

from finetune.training.order import BlanksLast
from finetune.training.router_losses import Batch, RouterLosses, RouterLossLog


class StepTrainer(SFTTrainer):
    """TRL's trainer, whose steps read nothing to the host; what is logged is summed on the device until then.

    TRL's own figures of entropy and accuracy, which nothing here logs, are not computed.
    """

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step, which the losses are means over."""
        samples = super().get_batch_samples(*args, **kwargs)
        if self.router is not None and samples[0]:
            self._whole = self.router.whole(samples[0])
            self.router_log.steps += 1
        return samples

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's row, with input tokens so far and the routers' losses by name."""
        if self.router is not None and "loss" in logs:
            logs = {**logs, **self.router_log.take(self.accelerator)}
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
        router = self.router
        if router is None:
            return self._own_loss(model, inputs, num_items_in_batch)
        base = router.base_logits(inputs)
        with router.listening() as logits:
            loss = self._own_loss(model, inputs, num_items_in_batch)
        parts = router.parts(logits, base, inputs, self._whole)
        self.router_log.add(parts)
        return loss + router.weighted(parts) * self.accelerator.num_processes  # gradients are averaged over processes

    def _own_loss(self, model: Any, inputs: Batch, num_items: Tensor | None) -> Tensor:
        """The negative log-likelihood of the labels per label of the whole batch, as TRL computes it."""
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        new = torch.full((), ids.numel(), device=ids.device) if mask is None else mask.sum()
        self._new_tokens = new if self._new_tokens is None else self._new_tokens + new
        outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True)
        count = outputs.label_mask.sum() if num_items is None else num_items
        loss: Tensor = -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return loss


def _one_later(rate: Callable[[int], float], step: int) -> float:
    return rate(step + 1)
