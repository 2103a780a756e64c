"""LoRA on a bank of experts, hosted by PEFT and computed by our kernels.

Two nested layers mirror stock PEFT's nested parameter wrappers, so names on disk and in memory are the same:

    experts             LoraExperts    factors of down_proj       base_layer -> ExpertFactors
    experts.base_layer  ExpertFactors  factors of gate_up_proj    base_layer -> the frozen bank

With one target alone there is one layer, LoraExperts with that target's factors around the bank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from finetune.adapters.factor import Factor
from finetune.errors import AdapterError, Problem
from finetune.kernels.ops import Backend, Dropout, Factors, expert_mlp
from finetune.models.qwen3 import EXPERT_PROJECTIONS

if TYPE_CHECKING:
    from finetune.adapters.config import ExpertLoraConfig

GATE_UP, DOWN = EXPERT_PROJECTIONS


class ExpertFactors(nn.Module, LoraLayer):
    """The factors of one projection, per adapter.

    projection: name of the bank's parameter they belong to.
    lora_A, lora_B: adapter name -> Factor.
    """

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, projection: str) -> None:
        nn.Module.__init__(self)
        self.projection = projection
        LoraLayer.__init__(self, base_layer)

    def _get_in_out_features(self, bank: nn.Module) -> tuple[int, int]:
        self.num_experts, height, width = getattr(bank, self.projection).shape
        return width, height

    def add_factors(self, name: str, config: ExpertLoraConfig, module_name: str) -> None:
        """New factors for adapter `name`: A uniform as PEFT starts it, B zero, in float32 (float64 in a float64 bank)."""
        rank, alpha = config.rank_and_alpha(f"{module_name}.{self.projection}")
        experts = config.experts_of(module_name, self.num_experts)
        factors = {
            "A": Factor("A", experts, self.num_experts, rank, self.in_features),
            "B": Factor("B", experts, self.num_experts, rank, self.out_features),
        }
        factors["A"].fill_uniform_(1 / math.sqrt(self.in_features))
        if not config.init_lora_weights:
            factors["B"].fill_uniform_(1 / math.sqrt(rank))
        weight = self._frozen_weight
        dtype = torch.promote_types(torch.float32, weight.dtype)
        on_meta = factors["A"].weight.is_meta
        for factor, holder in zip(factors.values(), (self.lora_A, self.lora_B), strict=True):
            holder[name] = factor.to(dtype=dtype) if on_meta else factor.to(weight.device, dtype)
        self.r[name], self.lora_alpha[name] = rank, alpha
        self.scaling[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.lora_dropout[name] = nn.Dropout(config.expert_dropout) if config.expert_dropout else nn.Identity()
        self.use_rslora[name], self.use_dora[name], self.lora_bias[name] = config.use_rslora, False, False

    @property
    def _frozen_weight(self) -> Tensor:
        weight = getattr(self.get_base_layer(), self.projection)
        assert isinstance(weight, Tensor)
        return weight

    def active_factors(self, names: Sequence[str]) -> Factors | None:
        """What the kernels take: the factors of adapters `names` that are here, as one; None when there are none."""
        found = [
            Factors(self.lora_A[n].weight, self.lora_B[n].weight, self.scaling[n], self.lora_A[n].slot_of_expert)
            for n in names
            if n in self.lora_A
        ]
        return combine(found) if found else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the delta of this projection to the frozen bank. `safe_merge` refuses values that are not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                if safe_merge:
                    self._check_finite(name)
                self._add_delta_(name, 1.0)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged deltas out again; in 16 bit the bank keeps the rounding of both steps."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add_delta_(self.merged_adapters.pop(), -1.0)

    @torch.no_grad()
    def _add_delta_(self, name: str, sign: float) -> None:
        for expert, delta in self._deltas(name):
            weight = self._frozen_weight[expert]
            weight.copy_(weight.to(delta.dtype).add_(delta, alpha=sign))

    def _check_finite(self, name: str) -> None:
        for expert, delta in self._deltas(name):
            if not torch.isfinite(self._frozen_weight[expert].to(delta.dtype) + delta).all():
                hint = "the adapter diverged in training; take an earlier checkpoint"
                raise AdapterError(Problem(f"adapter {name}, expert {expert}", "would not merge to finite weights", hint))

    @torch.no_grad()
    def _deltas(self, name: str) -> Any:
        a, b = self.lora_A[name], self.lora_B[name]
        for slot, expert in enumerate(a.experts):
            yield expert, self.scaling[name] * (b.weight[slot] @ a.weight[slot])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for holder in (self.lora_A, self.lora_B):
            if adapter_name in holder and not holder[adapter_name].weight.is_meta:
                holder[adapter_name].to(device or self._frozen_weight.device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The outer layer computes with these factors; nothing calls this one."""
        raise AssertionError("the factors of an expert bank are computed by LoraExperts")


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
        _check_bank(base_layer, target_name)
        targets = [p for p in (GATE_UP, DOWN) if p in config.expert_targets]
        if len(targets) == 2:
            base_layer = ExpertFactors(base_layer, GATE_UP)
        super().__init__(base_layer, targets[-1])
        for level in self.levels:
            level._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, target_name=target_name)

    @property
    def levels(self) -> list[ExpertFactors]:
        """This layer and, with both projections targeted, the one inside."""
        return [self, self.base_layer] if isinstance(self.base_layer, ExpertFactors) else [self]

    def update_layer(self, adapter_name: str, *_: Any, config: ExpertLoraConfig, target_name: str = "", **__: Any) -> None:
        """Add an adapter; PEFT calls it for the first one and every further one."""
        here = {level.projection for level in self.levels}
        if set(config.expert_targets) != here:
            hint = "adapters on one model must target the same expert projections"
            what = f"has adapters on {', '.join(sorted(here))} already"
            raise AdapterError(Problem(target_name or "experts", what, hint, config.expert_targets))
        for level in self.levels:
            level.add_factors(adapter_name, config, target_name)
            level.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any) -> Tensor:
        """The experts' output (T, H) for tokens (T, H), expert ids and routing weights (T, K).

        With adapters disabled or merged our kernels run without factors, so on and off differ by the adapter alone.
        """
        if kwargs.get("adapter_names") is not None:
            hint = "run one batch per adapter and switch with set_adapter"
            raise AdapterError(Problem("adapter_names", "expert adapters cannot be mixed in one batch", hint))
        bank: Any = self.get_base_layer()
        factors = self._active()
        return expert_mlp(
            hidden_states,
            top_k_index,
            top_k_weights,
            bank.gate_up_proj,
            bank.down_proj,
            gate_up_lora=factors.get(GATE_UP),
            down_lora=factors.get(DOWN),
            dropout=self._draw_dropout() if factors else None,
            backend=self.backend,
            recompute=self.recompute,
        )

    def _active(self) -> dict[str, Factors]:
        """Factors to compute with, by projection."""
        if self.disable_adapters:
            for level in self.levels:
                if level.merged:
                    level.unmerge()
            return {}
        found = {level.projection: level.active_factors(self.active_adapters) for level in self.levels if not level.merged}
        return {projection: factors for projection, factors in found.items() if factors is not None}

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


def combine(parts: Sequence[Factors]) -> Factors:
    """Several adapters on one projection as one of the sum of their ranks; slots are the union of theirs."""
    if len(parts) == 1:
        return parts[0]
    trained_E = torch.stack([part.slot_of_expert >= 0 for part in parts]).any(0)
    experts_X = trained_E.nonzero()[:, 0]
    slot_of_expert = torch.full_like(parts[0].slot_of_expert, -1)
    slot_of_expert[experts_X] = torch.arange(len(experts_X), device=experts_X.device)
    a_XRI = torch.cat([_spread(part.a_XRI, part, experts_X) for part in parts], dim=1)
    b_XOR = torch.cat([_spread(part.b_XOR * part.scale, part, experts_X) for part in parts], dim=2)
    return Factors(a_XRI, b_XOR, 1.0, slot_of_expert)


def _spread(weight: Tensor, part: Factors, experts_X: Tensor) -> Tensor:
    """A part's factor in the slots of `experts_X`, zero where the part has none."""
    slot_X = part.slot_of_expert[experts_X]
    return weight[slot_X.clamp(min=0)] * (slot_X >= 0)[:, None, None].to(weight.dtype)


def _check_bank(bank: nn.Module, name: str) -> None:
    """Our kernels compute SwiGLU over all experts on one device."""
    where = name or "experts"
    if not isinstance(getattr(bank, "act_fn", None), nn.SiLU):
        hint = "use a model with hidden_act: silu, as all Qwen3 have"
        raise AdapterError(Problem(where, "does not use SiLU", hint, type(getattr(bank, "act_fn", None)).__name__))
    if getattr(bank, "_is_expert_parallel", False):
        raise AdapterError(Problem(where, "is split over devices", "load the model without expert parallelism"))
