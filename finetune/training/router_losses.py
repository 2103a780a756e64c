"""Auxiliary losses of the routers in training, over the global batch: all micro-batches of a step on all processes.

Means over tokens add up over micro-batches. The load-balance loss also needs each expert's share of the whole batch
before the first backward, so with several micro-batches or processes the batch is read once more without gradients
to count it. However a batch is cut up, loss and gradient are the same but for rounding.

Of a layer in between, a reading without gradients keeps its counts alone. A loss with gradients needs the logits of all
layers at once, in the type they were multiplied in, and those of the base for `kl_to_base`: in 16 bit 256 bytes a
token and layer for 128 experts, each. What is computed from them lives for one tile of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from finetune.config.schema import RouterSection
from finetune.data.encode import IGNORED
from finetune.errors import Problem, RoutingError
from finetune.models.attention import LAYOUT
from finetune.models.live import router_layers
from finetune.models.text_model import text_config
from finetune.routing.losses import balance_loss, by_tiles, kl_to_base, tokens_of_experts, z_loss

Batch = dict[str, Any]
LOSSES = ("aux_loss", "z_loss", "kl_to_base")


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
        self._top_k = int(text_config(base).num_experts_per_tok)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Collects the logits (T, E) of every layer of the forward pass inside."""
        found: list[Tensor] = []
        with self._listening(found.append):
            yield found

    def whole(self, batches: Sequence[Batch]) -> Whole:
        """What the micro-batches of one optimizer step on this process, and those of the others, make together."""
        counts = [_count(batch, self._accelerator.device) for batch in batches]
        num_tokens = self._sum(torch.stack(counts).sum())
        alone = len(batches) == 1 and self._accelerator.num_processes == 1
        if not self._section.aux_loss or alone:
            return Whole(num_tokens)
        tokens = [torch.stack(self._read(batch, partial(self._tokens, batch))) for batch in batches]
        return Whole(num_tokens, self._sum(torch.stack(tokens).sum(0)))

    def base_logits(self, batch: Batch) -> list[Tensor]:
        """The base model's logits for a micro-batch; empty when no loss needs them."""
        if not self._section.kl_to_base:
            return []
        with self._model.disable_adapter():
            return self._read(batch, lambda logits_TE: logits_TE)

    def parts(self, logits: list[Tensor], base: list[Tensor], batch: Batch, whole: Whole) -> dict[str, Tensor]:
        """What a micro-batch adds to each loss, without weights."""
        real_T = _real_tokens(batch)
        names = [name for name in LOSSES if getattr(self._section, name)]
        found: list[Tensor] = []
        for layer, logits_TE in enumerate(logits):
            tokens_E = None
            if self._section.aux_loss:
                tokens_E = self._tokens(batch, logits_TE) if whole.tokens_LE is None else whole.tokens_LE[layer]
            losses = partial(_losses, names, whole.num_tokens, tokens_E)
            found.append(by_tiles(losses, logits_TE, base[layer] if base else None, real_T))
        return dict(zip(names, torch.stack(found).mean(0).unbind(), strict=True))

    def weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """The sum of the losses times their weights."""
        return torch.stack([getattr(self._section, name) * value for name, value in parts.items()]).sum()

    @torch.no_grad()
    def _read(self, batch: Batch, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """What `keep` makes of each layer's logits in a forward pass without gradients and dropout."""
        inputs = {
            name: batch[name].to(self._accelerator.device) if isinstance(batch[name], Tensor) else batch[name]
            for name in ("input_ids", "attention_mask", *LAYOUT)
            if name in batch
        }
        kept: list[Tensor] = []
        training = self._decoder.training
        self._decoder.eval()
        try:
            listening = self._listening(lambda logits_TE: kept.append(keep(logits_TE)))
            with self._accelerator.autocast(), listening, torch.compiler.set_stance("force_eager"):
                self._decoder(**inputs, use_cache=False)
        finally:
            self._decoder.train(training)
        return kept

    @contextmanager
    def _listening(self, listener: Callable[[Tensor], object]) -> Iterator[None]:
        """`listener` gets the logits (T, E) of every router, layer after layer."""

        def hand_over(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            listener(output[0])

        handles = [router.register_forward_hook(hand_over) for router in self._routers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tokens(self, batch: Batch, logits_TE: Tensor) -> Tensor:
        """Tokens of each expert of a layer, (E,)."""
        return tokens_of_experts(logits_TE, self._top_k, _real_tokens(batch, logits_TE.device))

    def _sum(self, values: Tensor) -> Tensor:
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total


def _losses(
    names: Sequence[str],
    num_tokens: Tensor,
    tokens_E: Any,
    logits_TE: Tensor,
    base_TE: Any,
    real_T: Tensor | None,
) -> Tensor:
    """What tokens of a layer add to the losses called `names`; tokens_E and base_TE are None where none needs them."""
    found = {
        "aux_loss": lambda: balance_loss(logits_TE, tokens_E, num_tokens, real_T),
        "z_loss": lambda: z_loss(logits_TE, num_tokens, real_T),
        "kl_to_base": lambda: kl_to_base(logits_TE, base_TE, num_tokens, real_T),
    }
    return torch.stack([found[name]() for name in names])


def _real_tokens(batch: Batch, device: torch.device | None = None) -> Tensor | None:
    """1 for those of a micro-batch's tokens that are neither padding nor of a blank row, 0 for the others, (T,).

    None when all are real. A blank row, or packed block, is one token without a label: see `data.blanks`.
    """
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if mask is None and labels.shape[-1] > 1:
        return None
    real = (labels != IGNORED).any(-1, keepdim=True).expand_as(labels)
    return (real if mask is None else real & mask.bool()).reshape(-1).long().to(device)


def _count(batch: Batch, device: torch.device) -> Tensor:
    real_T = _real_tokens(batch, device)
    if real_T is None:
        return torch.full((), batch["input_ids"].numel(), device=device)
    return real_T.sum()


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
