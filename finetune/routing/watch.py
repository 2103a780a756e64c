"""Watching the router while adapters train: who is busy, and how far routing has moved from the base model's.

Tensor shapes: T tokens, K experts per token, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from finetune.models.live import expert_layers, has_linear_attention
from finetune.routing.collect import Row, join_rows
from finetune.routing.plan import ExpertPlan
from finetune.routing.profile import Concentration, Counts, Sums, load_share

DRIFTED = 0.5
"""A layer in which less than this share of the probe's choices is the base model's has drifted strongly."""
COLLAPSED = 0.15
"""A layer whose load on the probe has lost this much entropy (of 1) against the base model begins to collapse."""


class LoadCounter:
    """Tokens that each expert gets in training steps; padding and evaluation are left out."""

    def __init__(self, decoder: nn.Module, num_experts: int) -> None:
        self._decoder = decoder
        self.layers = expert_layers(decoder)
        device = next(decoder.parameters()).device
        self._counts_LE = torch.zeros(len(self.layers), num_experts, dtype=torch.long, device=device)
        self._real_T: Tensor | None = None
        self._number = next(_NUMBERS)
        _COUNTERS[self._number] = self

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count from here on."""
        handles = [self._decoder.register_forward_pre_hook(self._note_padding, with_kwargs=True)]
        for row, module in enumerate(self.layers.values()):
            handles.append(module.register_forward_pre_hook(self._hook(row)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> Tensor:
        """The counts (L, E) of this process since the last call."""
        counts_LE = self._counts_LE.clone()
        self._counts_LE.zero_()
        return counts_LE

    def add(self, row: int, index_TK: Tensor) -> None:
        """Count the choices of a layer, without a wait for the device."""
        real_T = self._real_T
        ones_TK = torch.ones_like(index_TK) if real_T is None else real_T[:, None].expand_as(index_TK)
        self._counts_LE[row].index_add_(0, index_TK.reshape(-1), ones_TK.reshape(-1))

    def _note_padding(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._real_T = mask.reshape(-1).long() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _hook(self, row: int) -> Any:
        where = torch.tensor([self._number, row])  # a compiler would give layers with numbers of their own own code

        def listen(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
            return (args[0], count_choices(args[1], where), args[2]) if module.training else None

        return listen


_COUNTERS: WeakValueDictionary[int, LoadCounter] = WeakValueDictionary()
_NUMBERS = count(1)


@torch.library.custom_op("finetune::count_choices", mutates_args=(), schema="(Tensor index, Tensor where) -> Tensor")
def count_choices(index_TK: Tensor, where: Tensor) -> Tensor:
    """The expert ids (T, K) as they are, counted; one operator, so that compiled layers count too.

    where: the number of the counter, and the row of the layer.
    """
    number, row = where.tolist()
    _COUNTERS[number].add(row, index_TK)
    return index_TK.clone()


@count_choices.register_fake
def _(index_TK: Tensor, where: Tensor) -> Tensor:
    return torch.empty_like(index_TK)


class Probe:
    """A few fixed rows, to ask again and again where the router sends them."""

    def __init__(self, decoder: nn.Module, rows: Sequence[Row], num_experts: int) -> None:
        self._decoder = decoder
        whole = [range(len(rows))]  # linear attention would carry its state from row to row
        groups = [[row] for row in range(len(rows))] if has_linear_attention(decoder) else whole
        self._blocks = [join_rows(rows, group) for group in groups]
        self._num_experts = num_experts

    @torch.no_grad()
    def choices(self) -> list[Tensor]:
        """The experts (T, K) of every token in each layer, on the CPU; with dropout off, in whatever mode it was."""
        decoder: Any = self._decoder
        layers = expert_layers(decoder)
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        handles = [
            module.register_forward_pre_hook(lambda module, args, layer=layer: found[layer].append(args[1].cpu()))
            for layer, module in layers.items()
        ]
        device, training = next(decoder.parameters()).device, decoder.training
        decoder.eval()
        try:
            for block in self._blocks:
                ids_1T = block.ids_T.to(device)[None]
                with torch.compiler.set_stance("force_eager"):  # hooks like these are not a compiled layer's business
                    decoder(input_ids=ids_1T, **block.layout(device), use_cache=False)
        finally:
            decoder.train(training)
            for handle in handles:
                handle.remove()
        return [torch.cat(choices) for choices in found.values()]

    def load(self, choices: list[Tensor]) -> Counts:
        """How often each expert was chosen, (L, E)."""
        return np.stack([torch.bincount(c.reshape(-1), minlength=self._num_experts).numpy() for c in choices])


def overlap(choices: list[Tensor], base: list[Tensor]) -> list[float]:
    """Share of each layer's choices that the base model makes too."""
    pairs = zip(choices, base, strict=True)
    return [float((now[:, :, None] == then[:, None, :]).any(-1).double().mean()) for now, then in pairs]


@dataclass(frozen=True)
class Look:
    """One look at the router.

    layers: decoder layers of the rows below.
    load_LE: tokens per expert in the training steps since the last look; the probe's before the first step.
    probe_load_LE: tokens of the probe per expert.
    overlap: see `overlap`.
    """

    layers: tuple[int, ...]
    load_LE: Counts
    probe_load_LE: Counts
    overlap: list[float]

    def trained_share(self, plan: ExpertPlan | None) -> list[float]:
        """Share of each layer's load that goes to experts that train."""
        share_LE: Sums = load_share(self.load_LE)
        if plan is None:
            return [1.0] * len(self.layers)
        chosen = [list(plan.experts_by_layer.get(layer, ())) for layer in self.layers]
        return [float(share[experts].sum()) for share, experts in zip(share_LE, chosen, strict=True)]

    def to_row(self, plan: ExpertPlan | None) -> dict[str, Any]:
        """For metrics.jsonl: three numbers, and everything by layer under `routing`."""
        found, trained = Concentration.of(self.load_LE), self.trained_share(plan)
        return {
            "router_overlap": round(float(np.mean(self.overlap)), 5),
            "routed_to_trained": round(float(np.mean(trained)), 5),
            "dead_experts": int(found.dead.sum()),
            "routing": {
                "layers": list(self.layers),
                "load": load_share(self.load_LE).round(5).tolist(),
                "probe_load": load_share(self.probe_load_LE).round(5).tolist(),
                "entropy": found.entropy.round(5).tolist(),
                "variation": found.variation.round(5).tolist(),
                "dead": found.dead.tolist(),
                "overlap": [round(value, 5) for value in self.overlap],
                "trained": [round(value, 5) for value in trained],
            },
        }

    def warnings(self, base: Look) -> dict[str, str]:
        """What looks wrong beside the base model: `drift`, `collapse`."""
        found = {}
        worst = int(np.argmin(self.overlap))
        if self.overlap[worst] < DRIFTED:
            found["drift"] = (
                f"routing drifts: in layer {self.layers[worst]} the router makes {self.overlap[worst]:.0%} of the base "
                "model's choices on the same rows; lower train.learning_rate, mix in rows of the old skills, train "
                "fewer steps, or set router.kl_to_base"
            )
        lost = (
            Concentration.of(base.probe_load_LE).entropy - Concentration.of(self.probe_load_LE).entropy
        )  # on the same rows, so the data cannot be the reason
        worst = int(np.argmax(lost))
        if lost[worst] > COLLAPSED:
            found["collapse"] = (
                f"experts collapse: in layer {self.layers[worst]} the load on the same rows has lost {lost[worst]:.2f} "
                "of its entropy; lower train.learning_rate, or set router.kl_to_base; if the router trains, also "
                "router.aux_loss"
            )
        return found
