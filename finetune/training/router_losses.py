"""Auxiliary losses of the routers in training, over the global batch: all micro-batches of a step on all processes.

Means over tokens add up over micro-batches. The load-balance loss also needs each expert's share of the whole batch
before the first backward, so with several micro-batches or processes the batch is read once more without gradients
to count it. However a batch is cut up, loss and gradient are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from finetune.config.schema import RouterSection
from finetune.errors import Problem, RoutingError
from finetune.models.attention import LAYOUT
from finetune.models.live import router_layers
from finetune.routing.losses import balance_loss, kl_to_base, z_loss

Batch = dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """What the parts of a batch have to know of the whole: its tokens, and by layer those of each expert (L, E)."""

    num_tokens: Tensor
    tokens_LE: Tensor | None = None


class RouterLosses:
    """The losses of a recipe's router section; each is a mean over the layers that have a router.

    Raises RoutingError for a model without routers.
    """

    def __init__(self, model: PeftModel, section: RouterSection, accelerator: Accelerator) -> None:
        self._model, self._section, self._accelerator = model, section, accelerator
        base: Any = model.get_base_model()
        self._decoder = base.model
        self._routers = router_layers(self._decoder)
        if not self._routers:
            hint = "remove the router section: a dense model has no experts"
            raise RoutingError(Problem("router", "the model has no router", hint))
        self._top_k = int(base.config.num_experts_per_tok)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Collects the logits (T, E) of every layer of the forward pass inside."""
        found: list[Tensor] = []
        handles = [
            router.register_forward_hook(lambda module, args, output: found.append(output[0]))
            for router in self._routers.values()
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def whole(self, batches: Sequence[Batch]) -> Whole:
        """What the micro-batches of one optimizer step on this process, and those of the others, make together."""
        counts = [_count(batch, self._accelerator.device) for batch in batches]
        num_tokens = self._sum(torch.stack(counts).sum())
        alone = len(batches) == 1 and self._accelerator.num_processes == 1
        if not self._section.aux_loss or alone:
            return Whole(num_tokens)
        tokens = [self._choices(self._read(batch), batch) for batch in batches]
        return Whole(num_tokens, self._sum(torch.stack(tokens).sum(0)))

    def base_logits(self, batch: Batch) -> list[Tensor]:
        """The base model's logits for a micro-batch; empty when no loss needs them."""
        if not self._section.kl_to_base:
            return []
        with self._model.disable_adapter():
            return self._read(batch)

    def parts(self, logits: list[Tensor], base: list[Tensor], batch: Batch, whole: Whole) -> dict[str, Tensor]:
        """What a micro-batch adds to each loss, without weights."""
        real_T = _real_tokens(batch)
        tokens_LE = self._choices(logits, batch) if whole.tokens_LE is None else whole.tokens_LE
        found: dict[str, list[Tensor]] = {}
        for layer, logits_TE in enumerate(logits):
            if self._section.aux_loss:
                loss = balance_loss(logits_TE, tokens_LE[layer], whole.num_tokens, real_T)
                found.setdefault("aux_loss", []).append(loss)
            if self._section.z_loss:
                found.setdefault("z_loss", []).append(z_loss(logits_TE, whole.num_tokens, real_T))
            if self._section.kl_to_base:
                loss = kl_to_base(logits_TE, base[layer], whole.num_tokens, real_T)
                found.setdefault("kl_to_base", []).append(loss)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """The sum of the losses times their weights."""
        return torch.stack([getattr(self._section, name) * value for name, value in parts.items()]).sum()

    @torch.no_grad()
    def _read(self, batch: Batch) -> list[Tensor]:
        """Logits of a forward pass without gradients and dropout."""
        inputs = {
            name: batch[name].to(self._accelerator.device) if isinstance(batch[name], Tensor) else batch[name]
            for name in ("input_ids", "attention_mask", *LAYOUT)
            if name in batch
        }
        training = self._decoder.training
        self._decoder.eval()
        try:
            with self._accelerator.autocast(), self.listening() as logits, torch.compiler.set_stance("force_eager"):
                self._decoder(**inputs, use_cache=False)
        finally:
            self._decoder.train(training)
        return logits

    def _choices(self, logits: list[Tensor], batch: Batch) -> Tensor:
        """Tokens of each expert in each layer, (L, E)."""
        real_T = _real_tokens(batch)
        counts = []
        for logits_TE in logits:
            index_TK = logits_TE.detach().float().softmax(-1).topk(self._top_k).indices
            ones_TK = torch.ones_like(index_TK) if real_T is None else real_T[:, None].expand_as(index_TK)
            counts_E = index_TK.new_zeros(logits_TE.shape[1])
            counts.append(counts_E.index_add_(0, index_TK.reshape(-1), ones_TK.reshape(-1)))
        return torch.stack(counts)

    def _sum(self, values: Tensor) -> Tensor:
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total


def _real_tokens(batch: Batch) -> Tensor | None:
    """1 for those of a micro-batch's tokens that are no padding, 0 for the others, (T,); None when all are."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.reshape(-1).long()


def _count(batch: Batch, device: torch.device) -> Tensor:
    real_T = _real_tokens(batch)
    if real_T is None:
        return torch.full((), batch["input_ids"].numel(), device=device)
    return real_T.to(device).sum()


@dataclass
class RouterLossLog:
    """Means of the losses since they were last asked for: sums over micro-batches, divided by optimizer steps."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, parts: dict[str, Tensor]) -> None:
        """One micro-batch."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """By name, `router_aux_loss` and its like; over all processes."""
        means = {
            f"router_{name}": float(accelerator.reduce(value.clone(), "sum")) / max(self.steps, 1)
            for name, value in self.sums.items()
        }
        self.sums, self.steps = {}, 0
        return means
