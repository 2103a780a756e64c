"""What trains of one projection of an expert bank, low-rank factors or whole experts, as a PEFT layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.delta import Delta
from finetune.adapters.factor import Factor
from finetune.errors import AdapterError, Problem
from finetune.kernels.ops import Deltas, Factors
from finetune.models.live import PackedBank


class ExpertFactors(nn.Module, LoraLayer):
    """The factors of one projection, or the change of whole experts, per adapter.

    projection: name of the bank's parameter they belong to.
    lora_A, lora_B: adapter name -> Factor.
    lora_delta: adapter name -> Delta.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_delta")

    if TYPE_CHECKING:  # attributes of PEFT's untyped half
        _active_adapter: Any
        lora_delta: Any

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, projection: str) -> None:
        nn.Module.__init__(self)
        self.projection = projection
        LoraLayer.__init__(self, base_layer)
        self.lora_delta = nn.ModuleDict({})

    def _get_in_out_features(self, bank: nn.Module) -> tuple[int, int]:
        self.num_experts, height, width = getattr(bank, self.projection).shape
        return width, height

    def add(self, name: str, config: ExpertLoraConfig, module_name: str) -> None:
        """What adapter `name` trains here, in float32 (float64 in a float64 bank)."""
        experts = config.experts_of(module_name, self.num_experts)
        self.use_rslora[name], self.use_dora[name], self.lora_bias[name] = config.use_rslora, False, False
        if config.expert_mode == "full":
            self._place(self.lora_delta, name, Delta(experts, self.num_experts, (self.out_features, self.in_features)))
            self.r[name], self.lora_alpha[name], self.scaling[name] = 1, 1, 1.0
            self.lora_dropout[name] = nn.Identity()
        else:
            self._add_factors(name, config, f"{module_name}.{self.projection}", experts)

    def _add_factors(self, name: str, config: ExpertLoraConfig, key: str, experts: Sequence[int]) -> None:
        """New factors: A uniform as PEFT starts it, B zero."""
        rank, alpha = config.rank_and_alpha(key)
        factors = {
            "A": Factor("A", experts, self.num_experts, rank, self.in_features, config.ranks_of(key)),
            "B": Factor("B", experts, self.num_experts, rank, self.out_features, config.ranks_of(key)),
        }
        factors["A"].fill_uniform_(1 / math.sqrt(self.in_features))
        if not config.init_lora_weights:
            factors["B"].fill_uniform_(1 / math.sqrt(rank))
        self._place(self.lora_A, name, factors["A"])
        self._place(self.lora_B, name, factors["B"])
        self.r[name], self.lora_alpha[name] = rank, alpha
        self.scaling[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.lora_dropout[name] = nn.Dropout(config.expert_dropout) if config.expert_dropout else nn.Identity()

    def _place(self, holder: nn.ModuleDict, name: str, module: Factor | Delta) -> None:
        weight = self._frozen_weight
        dtype = torch.promote_types(torch.float32, weight.dtype)
        holder[name] = module.to(dtype=dtype) if module.weight.is_meta else module.to(weight.device, dtype)

    def trained(self, name: str) -> Factor | Delta | None:
        """What knows the experts of adapter `name` here; None when it has none here."""
        holders: tuple[Any, ...] = (self.lora_A, self.lora_delta)
        return next((holder[name] for holder in holders if name in holder), None)

    @property
    def _frozen_weight(self) -> Any:
        """The bank's stack of this projection: a tensor (E, out, in), or a PackedStack."""
        return getattr(self.get_base_layer(), self.projection)

    def active_factors(self, names: Sequence[str]) -> Factors | None:
        """What the kernels take: the factors of adapters `names` that are here, as one; None when there are none."""
        found = [
            Factors(self.lora_A[n].slots(), self.lora_B[n].slots(), self.scaling[n], self.lora_A[n].slot_of_expert)
            for n in names
            if n in self.lora_A
        ]
        return combine(found) if found else None

    def active_deltas(self, names: Sequence[str]) -> Deltas | None:
        """What the kernels take: the changes of whole experts by adapters `names`, as one; None when there are none."""
        found = [
            Deltas(self.lora_delta[n].weight, self.lora_delta[n].slot_of_expert, self.scaling[n])
            for n in names
            if n in self.lora_delta
        ]
        return combine_deltas(found) if found else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the delta of this projection to the frozen bank. `safe_merge` refuses values that are not finite."""
        if isinstance(self.get_base_layer(), PackedBank):
            hint = "save the adapter and merge it into the 16-bit model: finetune merge ADAPTER --output DIR"
            raise AdapterError(Problem(f"experts.{self.projection}", "is packed: nothing can be added to it", hint))
        for name in check_adapters_to_merge(self, adapter_names):
            if self.trained(name) is not None:
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
                where, hint = f"adapter {name}, expert {expert}", "the adapter diverged; take an earlier checkpoint"
                raise AdapterError(Problem(where, "would not merge to finite weights", hint))

    @torch.no_grad()
    def _deltas(self, name: str) -> Iterator[tuple[int, Tensor]]:
        trained = self.trained(name)
        assert trained is not None
        if name in self.lora_A:
            a_XRI, b_XOR = self.lora_A[name].slots(), self.lora_B[name].slots()
        for slot, expert in enumerate(trained.experts):
            delta_OI = self.lora_delta[name].weight[slot] if name in self.lora_delta else b_XOR[slot] @ a_XRI[slot]
            yield expert, self.scaling[name] * delta_OI

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for holder in (self.lora_A, self.lora_B, self.lora_delta):
            if adapter_name in holder and not holder[adapter_name].weight.is_meta:
                holder[adapter_name].to(device or self._frozen_weight.device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The outer layer computes with these factors; nothing calls this one."""
        raise AssertionError("the factors of an expert bank are computed by LoraExperts")


def combine(parts: Sequence[Factors]) -> Factors:
    """Several adapters on one projection as one of the sum of their ranks; slots are the union of theirs."""
    if len(parts) == 1:
        return parts[0]
    experts_X, slot_of_expert = _union([part.slot_of_expert for part in parts])
    a_XRI = torch.cat([_spread(part.a_XRI, part, experts_X) for part in parts], dim=1)
    b_XOR = torch.cat([_spread(part.b_XOR * part.scale, part, experts_X) for part in parts], dim=2)
    return Factors(a_XRI, b_XOR, 1.0, slot_of_expert)


def combine_deltas(parts: Sequence[Deltas]) -> Deltas:
    """Several changes of whole experts as their sum; slots are the union of theirs."""
    if len(parts) == 1:
        return parts[0]
    experts_X, slot_of_expert = _union([part.slot_of_expert for part in parts])
    summed = torch.stack([_spread(part.delta_XOI, part, experts_X) * part.scale for part in parts]).sum(0)
    return Deltas(summed, slot_of_expert)


def _union(slots: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Experts (X,) that have a slot anywhere, and the slot of each expert (E,) among them."""
    trained_E = torch.stack([slot_of_expert >= 0 for slot_of_expert in slots]).any(0)
    experts_X = trained_E.nonzero()[:, 0]
    slot_of_expert = torch.full_like(slots[0], -1)
    slot_of_expert[experts_X] = torch.arange(len(experts_X), device=experts_X.device)
    return experts_X, slot_of_expert


def _spread(weight: Tensor, part: Factors | Deltas, experts_X: Tensor) -> Tensor:
    """A part's weight in the slots of `experts_X`, zero where the part has none."""
    slot_X = part.slot_of_expert[experts_X]
    return weight[slot_X.clamp(min=0)] * (slot_X >= 0)[:, None, None].to(weight.dtype)
