"""The PEFT configuration of our adapters, and how it is written so that stock PEFT loads the folder.

Live and on disk differ in how targets are spelled, because stock PEFT wraps parameters where we wrap modules:

    live target_modules                  on disk
    experts                              target_parameters: the projections targeted of every bank
    a bank by its full name              target_parameters: the projections targeted of that bank
    a dense MLP's projection (in a MoE)  target_parameters: its weight
    a router                             target_parameters: its weight
    others                               target_modules: the same

Whole experts are in no layout that stock PEFT knows. With them its peft_type is one it refuses, and their targets are
in the sidecar alone.

Stock PEFT refuses dropout on parameters, so with any of them lora_dropout is 0 on disk; the sidecar has the true rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from finetune.adapters.files import FORMAT_VERSION, SIDECAR, ends_of, read_sidecar
from finetune.adapters.stock_config import ADAPTER_CONFIG, WHOLE_EXPERTS, read_json_object
from finetune.architecture.names import (
    EXPERT_PROJECTIONS,
    EXPERTS,
    MLP,
    SHARED_EXPERT,
    bank_target,
    is_bank,
    layer_index,
)
from finetune.errors import AdapterError, Problem
from finetune.models.files import write_json_atomic
from finetune.routing.plan import ExpertPlan

_BANK_PARAMETER = re.compile(rf"(?:(?P<bank>.*\b{EXPERTS})\.)?(?P<projection>{'|'.join(EXPERT_PROJECTIONS)})")
_PLAIN_PARAMETER = re.compile(rf"(?:.*\.)?(?:{MLP}|{SHARED_EXPERT})\.(?:\w+_proj|gate)\.weight")


class PlainTarget(str):
    """A projection of the dense layers of a mixture-of-experts model as a target, or a router.

    PEFT takes every target that is named as a matrix of an expert for a fused expert parameter of an older
    transformers and rewrites it. It asks the string, and this one says no.
    """

    __slots__ = ()

    def endswith(self, *args: Any) -> bool:
        """False, whatever the suffix."""
        return False


@dataclass
class ExpertLoraConfig(LoraConfig):
    """LoraConfig that knows expert banks.

    expert_targets: projections of the bank that get factors.
    expert_plan: which experts; all of the targeted layers when None.
    expert_dropout: rate on the input of the experts' factors.
    expert_mode: `lora`, or `full` to train the weights of the experts in the plan.
    router: `lora`, or `full` for factors of full rank of which A alone trains; read where routers are targeted.
    section: the recipe's adapter section this came from, for the record.
    base_fingerprint: see `models.checkpoint.base_fingerprint`; None when the base is not on disk.
    thinking: the `enable_thinking` whose prompt leads to the answers it was trained on; None where it makes no
        difference or is not known.
    ends: tokens it was trained to end its answers with.
    quantize: the recipe's quantize section with which the base was packed; None for a base in 16 bit.
    packed_in: folder of that packed base, where it came from one.
    rope_scaling: in the place of what the base's config.json says about positions; None to leave that.

    rank_pattern and alpha_pattern match the projections of banks by name, as stock PEFT's do.
    """

    expert_targets: tuple[str, ...] = ()
    expert_plan: ExpertPlan | None = None
    expert_dropout: float = 0.0
    expert_mode: str = "lora"
    router: str = "lora"
    section: dict[str, Any] | None = field(default=None)
    base_fingerprint: str | None = None
    quantize: dict[str, Any] | None = field(default=None)
    packed_in: str | None = None
    rope_scaling: dict[str, Any] | None = field(default=None)
    thinking: bool | None = field(default=None)
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expert_plan, self.expert_targets = _as_plan(self.expert_plan), tuple(self.expert_targets)
        self.ends = tuple(self.ends)
        targets: Any = self.target_modules
        if isinstance(targets, set):
            prefix = f"{MLP}."
            self.target_modules: Any = {PlainTarget(t) if t.startswith(prefix) and t != EXPERTS else t for t in targets}
        if self.init_lora_weights not in (True, False):
            hint = "leave init_lora_weights at True"
            raise AdapterError(
                Problem("init_lora_weights", "is not supported with experts", hint, self.init_lora_weights)
            )

    def rank_and_alpha(self, key: str) -> tuple[int, float]:
        """Rank and alpha of a module or bank parameter by its full name, matched as PEFT does."""
        rank_key = get_pattern_key(self.rank_pattern.keys(), key)
        alpha_key = get_pattern_key(self.alpha_pattern.keys(), key)
        return self.rank_pattern.get(rank_key, self.r), self.alpha_pattern.get(alpha_key, self.lora_alpha)

    def experts_of(self, module_name: str, num_experts: int) -> tuple[int, ...]:
        """Experts of a layer's bank that get factors. Raises AdapterError when the plan is for another model."""
        if self.expert_plan is None:
            return tuple(range(num_experts))
        if self.expert_plan.num_experts != num_experts:
            hint = "make the plan with this model"
            what = f"has {num_experts} experts, but the expert plan is for {self.expert_plan.num_experts}"
            raise AdapterError(Problem(module_name, what, hint))
        experts = self.expert_plan.experts_by_layer.get(layer_index(module_name))
        if experts is None:
            raise AdapterError(Problem(module_name, "is targeted but not in the expert plan", "target its layers only"))
        return experts

    def ranks_of(self, name: str) -> tuple[int, ...] | None:
        """Rank of each expert that `experts_of` names for a layer's bank; None when all have the adapter's."""
        ranks = None if self.expert_plan is None else self.expert_plan.ranks_by_layer
        return None if ranks is None else ranks[layer_index(name)]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json as stock PEFT reads it, and the sidecar."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = {key: sorted(v) if isinstance(v, (set, frozenset)) else v for key, v in self.to_dict().items()}
        for ours in _OUR_FIELDS:
            del content[ours]
        targets: Any = self.target_modules
        if isinstance(targets, set):
            parameters = [p for target in targets for p in self._parameters_of(target)]
            content["target_modules"] = sorted(t for t in targets if not (self._parameters_of(t) or _is_bank(t)))
            content["target_parameters"] = sorted(parameters) or None
            if parameters:
                content["lora_dropout"] = 0.0
        if self.expert_mode == "full":
            content["peft_type"] = WHOLE_EXPERTS
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_json_atomic(folder / ADAPTER_CONFIG, dict(sorted(content.items())))
        write_json_atomic(folder / SIDECAR, self._sidecar())

    def _parameters_of(self, target: str) -> list[str]:
        """What stock PEFT has to wrap as parameters for one of our target modules; nothing for plain modules."""
        if _is_bank(target):
            if self.expert_mode == "full":
                return []
            bank = EXPERTS if target == "experts" else target
            return [f"{bank}.{projection}" for projection in self.expert_targets]
        return [f"{target}.weight"] if isinstance(target, PlainTarget) else []

    def _sidecar(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model_name_or_path,
            "base_fingerprint": self.base_fingerprint,
            "quantize": self.quantize,
            "packed_in": self.packed_in,
            "rope_scaling": self.rope_scaling,
            "thinking": self.thinking,
            "ends": list(self.ends),
            "dropout": self.lora_dropout,
            "expert_dropout": self.expert_dropout,
            "expert_mode": self.expert_mode,
            "expert_targets": list(self.expert_targets),
            "router": self.router,
            "experts": None if self.expert_plan is None else self.expert_plan.to_dict(),
            "adapter": self.section,
        }

    @classmethod
    def load(cls, folder: str | Path) -> ExpertLoraConfig:
        """The configuration of a saved adapter, stock PEFT's too. Without the sidecar: all experts, no dropout.

        Raises AdapterError for settings we do not host.
        """
        folder = Path(folder)
        content = read_json_object(folder / ADAPTER_CONFIG)
        known = {f.name for f in fields(LoraConfig)} - {"peft_type", "runtime_config"}
        options = {name: value for name, value in content.items() if name in known}
        modules, experts = _live_targets(folder, options.pop("target_parameters", None) or ())
        if modules:
            named = options.get("target_modules") or []
            if isinstance(named, str):
                hint = "give target_modules as a list"
                raise AdapterError(Problem(str(folder), "targets experts and modules by a pattern", hint, named))
            options["target_modules"] = [*named, *modules]
        sidecar = read_sidecar(folder) or {}
        if sidecar.get("experts") is not None:
            options["expert_plan"] = plan = ExpertPlan.from_dict(sidecar["experts"])
            if sidecar.get("expert_mode") == "full":
                banks = [bank_target(layer) for layer in plan.experts_by_layer]
                options["target_modules"] = [*(options.get("target_modules") or []), *banks]
                options["expert_mode"], experts = "full", tuple(sidecar["expert_targets"])
        if "dropout" in sidecar:
            options["lora_dropout"], options["expert_dropout"] = sidecar["dropout"], sidecar.get("expert_dropout", 0.0)
        options["router"] = sidecar.get("router", "lora")
        options["section"], options["base_fingerprint"] = sidecar.get("adapter"), sidecar.get("base_fingerprint")
        options |= {name: sidecar.get(name) for name in ("quantize", "packed_in", "rope_scaling", "thinking")}
        options["ends"] = ends_of(sidecar)
        return cls(**options, expert_targets=experts)


def _is_bank(target: str) -> bool:
    return target == "experts" or is_bank(str(target))


def _as_plan(value: Any) -> ExpertPlan | None:
    """A plan, also one that `dataclasses.asdict` took apart."""
    return ExpertPlan(**value) if isinstance(value, dict) else value


_OUR_FIELDS = tuple({f.name for f in fields(ExpertLoraConfig)} - {f.name for f in fields(LoraConfig)})


def _live_targets(folder: Path, parameters: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Our target modules and expert projections for stock PEFT's target_parameters."""
    modules: dict[str, set[str]] = {}  # module -> expert projections, none for others
    problems = []
    for parameter in sorted(parameters):
        if match := _BANK_PARAMETER.fullmatch(parameter):
            bank = match["bank"] or EXPERTS
            modules.setdefault("experts" if bank == EXPERTS else bank, set()).add(match["projection"])
        elif _PLAIN_PARAMETER.fullmatch(parameter):
            modules.setdefault(PlainTarget(parameter.removesuffix(".weight")), set())
        else:
            hint = "only routers and the projections of experts and dense MLPs are hosted"
            problems.append(Problem(str(folder), "targets a parameter we do not know", hint, parameter))
    projections = {frozenset(p) for p in modules.values() if p}
    if len(projections) > 1:
        hint = "adapt the same projections in every layer"
        problems.append(Problem(str(folder), "targets other expert projections in some layers than in others", hint))
    if problems:
        raise AdapterError(*problems)
    chosen = next(iter(projections), frozenset())
    return list(modules), tuple(p for p in EXPERT_PROJECTIONS if p in chosen)
