"""LoRA on a bank of experts, or the training of whole experts, hosted by PEFT and computed by our kernels.

Two nested layers mirror stock PEFT's nested parameter wrappers, so names on disk and in memory are the same:

    experts             LoraExperts    factors of down_proj       base_layer -> ExpertFactors
    experts.base_layer  ExpertFactors  factors of gate_up_proj    base_layer -> the frozen bank

With one target alone there is one layer, LoraExperts with that target's factors around the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.expert_factors import ExpertFactors
from finetune.architecture.names import DOWN, GATE_UP
from finetune.errors import AdapterError, Problem
from finetune.kernels.ops import Backend, Deltas, Dropout, ExpertLayer, Factors, expert_mlp, prepare
from finetune.kernels.tiles import Load, tune
from finetune.models.live import PackedBank, computes_as_ours


class LoraExperts(ExpertFactors):
    """Takes the place of a frozen expert bank in the model and answers for it.

    backend: kernel backend, see `kernels.ops`.
    recompute: save less for backward and compute gate_up again there.
    """

    backend: Backend = "auto"
    recompute: bool = False

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ExpertLoraConfig, target_name: str = "", **_: Any
    ) -> None:
        problems = bank_problems(base_layer, target_name or "experts")
        if problems:
            raise AdapterError(*problems)
        targets = [p for p in (GATE_UP, DOWN) if p in config.expert_targets]
        if len(targets) == 2:
            base_layer = ExpertFactors(base_layer, GATE_UP)
        super().__init__(base_layer, targets[-1])
        for level in self.levels:
            level._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, target_name=target_name)

    @property
    def levels(self) -> list[ExpertFactors]:
        """The layer itself and, with both projections targeted, the one inside."""
        return [self, self.base_layer] if isinstance(self.base_layer, ExpertFactors) else [self]

    def update_layer(
        self, adapter_name: str, *_: Any, config: ExpertLoraConfig, target_name: str = "", **__: Any
    ) -> None:
        """Add an adapter; PEFT calls it for the first one and every further one."""
        here = {level.projection for level in self.levels}
        if set(config.expert_targets) != here:
            hint = "adapters on one model must target the same expert projections"
            what = f"has adapters on {', '.join(sorted(here))} already"
            raise AdapterError(Problem(target_name or "experts", what, hint, config.expert_targets))
        for level in self.levels:
            level.add(adapter_name, config, target_name)
            level.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any) -> Tensor:
        """The experts' output (T, H) for tokens (T, H), expert ids and routing weights (T, K).

        With adapters disabled or merged our kernels run without factors, so on and off differ by the adapter alone.
        """
        if kwargs.get("adapter_names") is not None:
            hint = "run one batch per adapter and switch with set_adapter"
            raise AdapterError(Problem("adapter_names", "expert adapters cannot be mixed in one batch", hint))
        bank: Any = self.get_base_layer()
        factors, deltas = self._trained(self._active())
        return expert_mlp(
            hidden_states,
            top_k_index,
            top_k_weights,
            bank.gate_up_proj,
            bank.down_proj,
            gate_up_lora=factors.get(GATE_UP),
            down_lora=factors.get(DOWN),
            gate_up_delta=deltas.get(GATE_UP),
            down_delta=deltas.get(DOWN),
            dropout=self._draw_dropout() if any(factors.values()) else None,
            backend=self.backend,
            recompute=self.recompute,
        )

    def prepare_products(self) -> None:
        """Choose and check the products of forward before it is called, with adapters and without."""
        for levels in (self.levels, list[ExpertFactors]()):
            prepare(self._layer(levels), self.backend)

    def tune_products(self, load: Load) -> None:
        """Choose and check the tiles of forward, with adapters, for a run."""
        tune(self._layer(self.levels), load, self.backend)

    def _layer(self, levels: Sequence[ExpertFactors]) -> ExpertLayer:
        """What forward gives the kernels."""
        bank: Any = self.get_base_layer()
        factors, deltas = self._trained(levels)
        return ExpertLayer(
            bank.gate_up_proj,
            bank.down_proj,
            factors.get(GATE_UP),
            factors.get(DOWN),
            gate_up_delta=deltas.get(GATE_UP),
            down_delta=deltas.get(DOWN),
        )

    def _trained(self, levels: Sequence[ExpertFactors]) -> tuple[dict[str, Factors | None], dict[str, Deltas | None]]:
        """What the active adapters add to each projection: factors and whole changes."""
        names = self.active_adapters
        factors = {level.projection: level.active_factors(names) for level in levels}
        return factors, {level.projection: level.active_deltas(names) for level in levels}

    def _active(self) -> list[ExpertFactors]:
        """The levels to compute with."""
        if self.disable_adapters:
            for level in self.levels:
                if level.merged:
                    level.unmerge()
            return []
        return [level for level in self.levels if not level.merged]

    def _draw_dropout(self) -> Dropout | None:
        layers = [self.lora_dropout[name] for name in self.active_adapters if name in self.lora_dropout]
        rates = {layer.p if isinstance(layer, nn.Dropout) and layer.training else 0.0 for layer in layers}
        if len(rates) > 1:
            hint = "give the adapters one rate, or train one at a time"
            raise AdapterError(Problem("expert dropout", "differs between the active adapters", hint, sorted(rates)))
        rate = rates.pop() if rates else 0.0
        return Dropout.draw(rate) if rate else None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The frozen bank, with the adapters merged into it if asked. PEFT's merge_and_unload calls it."""
        if merge:
            for level in self.levels:
                level.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        bank: nn.Module = self.get_base_layer()
        return bank


def bank_problems(bank: Any, name: str) -> list[Problem]:
    """Why our kernels cannot stand in for this bank: they compute SwiGLU over all experts on one device."""
    problems = []
    named = getattr(getattr(bank, "config", None), "hidden_act", "silu")
    activations = [named]
    if not isinstance(bank, PackedBank):
        if computes_as_ours(type(bank)):
            activations = _activations(bank)
        else:
            hint = "experts have to be computed as those of the families in docs/models.md"
            problems.append(Problem(name, "is computed otherwise than our kernels do", hint, type(bank).__name__))
    others = [activation for activation in activations if activation not in _SILU]
    if others:
        told = others[0] if named in _SILU else named
        problems.append(Problem(name, "does not use SiLU", "use a model with hidden_act: silu", told))
    if getattr(bank, "_is_expert_parallel", False):
        problems.append(Problem(name, "is split over devices", "load the model without expert parallelism"))
    return problems


_SILU = ("silu", "swish")


def _activations(bank: nn.Module) -> list[str]:
    """What a bank computes beside its products; "silu" by its values, its class differs between versions."""
    functions = [value for name, value in vars(bank).items() if callable(value) and not name.startswith("_")]
    x = torch.linspace(-4, 4, 9)
    return [
        "silu" if torch.allclose(function(x), functional.silu(x)) else type(function).__name__
        for function in (*bank.children(), *functions)
    ]
