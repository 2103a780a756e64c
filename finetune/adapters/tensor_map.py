"""Which tensors of an adapter's file change which weight of a hub checkpoint, by names and shapes alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune.adapters.layouts import b_order
from finetune.adapters.stock_config import StockConfig
from finetune.architecture.names import (
    EXPERT_MATRICES,
    EXPERT_PROJECTIONS,
    EXPERTS,
    GATE_UP,
    bank_name,
    expert_module,
    in_layer,
    layer_index,
)
from finetune.config.tensor_header import TensorInfo
from finetune.errors import AdapterError, Problem
from finetune.models.tensor_file import WEIGHT_DTYPES, TensorFile
from finetune.routing.plan import ExpertPlan

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>A|B|delta)\.weight")
_BANK = re.compile(rf"(?P<experts>(?:.+\.)?{re.escape(EXPERTS)})(?P<inner>\.base_layer)?")
_FIRST_PACKING = (0, 19)


@dataclass(frozen=True)
class LoraTensors:
    """Where the factors of one hub weight lie in the adapter's file.

    shape: (out, in) of the weight.  expert: index in a fused bank, None for a plain module.  chunk: which chunk of the
    rows of B it is, and of how many (gate is 0 of 2, up is 1 of 2).
    """

    a_name: str
    b_name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    expert: int | None = None
    chunk: tuple[int, int] = (0, 1)

    @property
    def name(self) -> str:
        """The tensor that messages name."""
        return self.a_name


@dataclass(frozen=True)
class DeltaSlot:
    """Where the delta of one weight of an expert that trains whole lies: in a slot of tensor `name` (X, out, in).

    The rest is as in LoraTensors.
    """

    name: str
    shape: tuple[int, int]
    slot: int
    expert: int
    chunk: tuple[int, int]


@dataclass(frozen=True)
class WholeExperts:
    """What the sidecar says of experts that train whole: which ones, and which fused parameters of them."""

    plan: ExpertPlan
    targets: tuple[str, ...]


@dataclass(frozen=True)
class TensorMap:
    """The tensors of a file by the hub weight they change, and per fused bank its number of experts."""

    by_weight: dict[str, LoraTensors | DeltaSlot]
    num_experts: dict[str, int]


def read_tensor_map(
    config: StockConfig, file: TensorFile, *, ours: bool, whole: WholeExperts | None = None
) -> TensorMap:
    """Assigns every tensor of the file to weights, each exactly once. Raises AdapterError with every problem.

    ours: the adapter was saved here, so its packing is known whatever the settings say about PEFT's version.
    whole: experts that train whole, None for none.
    """
    reader = _Reader(config, file, whole)
    reader.read()
    if reader.num_experts and not ours:
        reader.check_packing()
    reader.check_leftovers()
    if reader.problems:
        raise AdapterError(*reader.problems)
    return TensorMap(reader.tensor_map, reader.num_experts)


class _Reader:
    """Turns tensor names and shapes into a map; collects problems instead of stopping at the first."""

    def __init__(self, config: StockConfig, file: TensorFile, whole: WholeExperts | None) -> None:
        self.config, self.file, self.whole = config, file, whole
        self.tensor_map: dict[str, LoraTensors | DeltaSlot] = {}
        self.num_experts: dict[str, int] = {}
        self.consumed: set[str] = set()
        self.problems: list[Problem] = []

    def read(self) -> None:
        modules: dict[str, dict[str, str]] = {}
        for name in self.file.tensors:
            if match := _KEY.fullmatch(name):
                modules.setdefault(match["module"], {})[match["side"]] = name
            else:
                self._refuse(name, *_why_unknown(name))
        self._read_whole({module: sides.pop("delta") for module, sides in modules.items() if "delta" in sides})
        for module, sides in modules.items():
            if len(sides) == 2:
                self._read_module(module, sides["A"], sides["B"], modules)
            elif sides:
                present, absent = ("A", "B") if "A" in sides else ("B", "A")
                self._refuse(sides[present], f"has no lora_{absent} beside it", "the file is incomplete: save it again")

    def check_leftovers(self) -> None:
        """After everything else: a tensor that changes nothing, and was not refused already, is a bug or a surprise."""
        if not self.file.tensors:
            self._refuse("no tensor", "the file holds no factors", "save the adapter again")
        if not self.problems:
            for name in sorted(set(self.file.tensors) - self.consumed):
                self._refuse(name, "changes no weight", "remove it, or save the adapter again")

    def check_packing(self) -> None:
        """Refuses banks whose packing is not that of PEFT 0.19 and later, by what the settings and B tell."""
        where = f"{self.config.path}: peft_version"
        if not packs_as_now(self.config.peft_version):
            what = "the packing of the expert factors is not known to be that of PEFT 0.19 and later"
            self.problems.append(Problem(where, what, _PACKING_HINT, self.config.peft_version))
        elif self.config.by_unsloth:
            where = f"{self.config.path}: auto_mapping"
            what = "Unsloth made it, and ordered the columns of lora_B otherwise than PEFT until September 2026"
            self.problems.append(Problem(where, what, _PACKING_HINT))
        elif not self.problems:
            banks = {
                (tensors.b_name, tensors.rank)
                for tensors in self.tensor_map.values()
                if isinstance(tensors, LoraTensors) and tensors.expert is not None
            }
            for name, rank in sorted(banks):
                stock = self.file.read(name)
                if b_order(stock, stock.shape[1] // rank, rank) == "expert-major":
                    self._refuse(
                        name, "has its zero columns where another packing has an untrained expert", _PACKING_HINT
                    )

    def _read_module(self, module: str, a_name: str, b_name: str, modules: dict[str, Any]) -> None:
        a, b = self.file.tensors[a_name], self.file.tensors[b_name]
        if not self._check_factors(a_name, a, b_name, b):
            return
        bank = _BANK.fullmatch(module)
        if bank is None:
            self._read_linear(module, a_name, b_name)
            return
        parameter = self._fused_parameter(module, bank, modules)
        if parameter is not None:
            self._read_bank(bank["experts"], parameter, a_name, b_name)

    def _read_whole(self, found: dict[str, str]) -> None:
        """The changes of whole experts, one tensor for each bank and fused parameter that the sidecar names."""
        if self.whole is None:
            for name in found.values():
                self._refuse(name, "holds whole experts, but the sidecar does not say which", "save the adapter again")
            return
        targets = [target for target in EXPERT_PROJECTIONS if target in self.whole.targets]
        banks = {layer_index(module): module.removesuffix(".base_layer") for module in found if in_layer(module)}
        for layer, experts in self.whole.plan.experts_by_layer.items():
            bank = banks.get(layer, bank_name(layer))
            for target in targets:
                module = f"{bank}.base_layer" if len(targets) == 2 and target == GATE_UP else bank
                if module in found:
                    self._read_slots(found.pop(module), bank, target, experts)
                else:
                    where = f"base_model.model.{module}.lora_delta.weight"
                    self._refuse(where, "is missing", "the file is incomplete: save it again")
            self.num_experts[bank] = self.whole.plan.num_experts
        for name in found.values():
            self._refuse(name, "holds experts of a layer that is not in the plan", "save the adapter again")

    def _read_slots(self, name: str, bank: str, target: str, experts: tuple[int, ...]) -> None:
        info = self.file.tensors[name]
        matrices = EXPERT_MATRICES[target]
        if info.dtype not in WEIGHT_DTYPES or len(info.shape) != 3 or len(experts) != info.shape[0]:
            what = f"is not one matrix for each of {len(experts)} experts: {info.dtype} {list(info.shape)}"
            self._refuse(name, what, "save the adapter again")
            return
        for slot, expert in enumerate(experts):
            for index, matrix in enumerate(matrices):
                shape = (info.shape[1] // len(matrices), info.shape[2])
                self._add(
                    f"{expert_module(bank, expert, matrix)}.weight",
                    DeltaSlot(name, shape, slot, expert, (index, len(matrices))),
                )
        self.consumed.add(name)

    def _check_factors(self, a_name: str, a: TensorInfo, b_name: str, b: TensorInfo) -> bool:
        before = len(self.problems)
        for name, info in ((a_name, a), (b_name, b)):
            if info.dtype not in WEIGHT_DTYPES:
                self._refuse(
                    name, f"is {info.dtype}, which factors never are", "save the adapter as float32 or bfloat16"
                )
            if len(info.shape) != 2 or 0 in info.shape:
                self._refuse(name, f"is not a matrix: {list(info.shape)}", "save the adapter again")
        if len(self.problems) == before and a.shape[0] != b.shape[1]:
            what = f"has {b.shape[1]} columns but its lora_A has {a.shape[0]} rows"
            self._refuse(b_name, what, "the two come from different adapters: save it again")
        return len(self.problems) == before

    def _read_linear(self, module: str, a_name: str, b_name: str) -> None:
        a, b = self.file.tensors[a_name], self.file.tensors[b_name]
        rank = self.config.rank_of(module)
        if module.endswith(".base_layer") or ".base_layer." in module:
            self._refuse(a_name, "is a wrapped layer inside a wrapped layer", "only expert banks nest: save it again")
        elif a.shape[0] != rank:
            self._refuse(a_name, f"has rank {a.shape[0]} but adapter_config.json says {rank}", _RANK_HINT)
        else:
            shape = (b.shape[0], a.shape[1])
            self._add(f"{module}.weight", LoraTensors(a_name, b_name, shape, rank, self.config.scale_of(module)))
            self.consumed |= {a_name, b_name}

    def _fused_parameter(self, module: str, bank: re.Match[str], modules: dict[str, Any]) -> str | None:
        """Which parameter the factors of a bank or its `base_layer` belong to, by target_parameters alone."""
        experts = bank["experts"]
        levels = [level for level in (experts, f"{experts}.base_layer") if level in modules]
        targets = [name for name in EXPERT_PROJECTIONS if self.config.targets_parameter(f"{experts}.{name}")]
        if len(levels) == len(targets) == 2:
            return targets[0] if bank["inner"] else targets[1]
        if len(levels) == len(targets) == 1 and not bank["inner"]:
            return targets[0]
        found = ", ".join(level.rsplit(".", 1)[-1] for level in levels)
        what = f"lies in {found} of its expert bank, but target_parameters names {' and '.join(targets) or 'neither'}"
        self._refuse(f"base_model.model.{module}.lora_A.weight", what, "the file or its settings are incomplete")
        return None

    def _read_bank(self, experts: str, parameter: str, a_name: str, b_name: str) -> None:
        a, b = self.file.tensors[a_name], self.file.tensors[b_name]
        key = f"{experts}.{parameter}"
        rank, scale = self.config.rank_of(key), self.config.scale_of(key)
        num_experts, rest = divmod(a.shape[0], rank)
        if rest:
            self._refuse(a_name, f"has {a.shape[0]} rows, which is no multiple of rank {rank}", _RANK_HINT)
            return
        known = self.num_experts.setdefault(experts, num_experts)
        if num_experts != known:
            what = f"is for {num_experts} experts, but the other factors of the bank are for {known}"
            self._refuse(a_name, what, _RANK_HINT)
            return
        matrices = EXPERT_MATRICES[parameter]
        height, odd = divmod(b.shape[0], len(matrices))
        if odd:
            self._refuse(b_name, f"has {b.shape[0]} rows, which is not gate and up of one size", "save it again")
            return
        for expert in range(num_experts):
            for index, matrix in enumerate(matrices):
                shape = (height, a.shape[1])
                tensors = LoraTensors(a_name, b_name, shape, rank, scale, expert, (index, len(matrices)))
                self._add(f"{expert_module(experts, expert, matrix)}.weight", tensors)
        self.consumed |= {a_name, b_name}

    def _add(self, name: str, tensors: LoraTensors | DeltaSlot) -> None:
        if name in self.tensor_map:
            self._refuse(
                tensors.name, f"changes {name}, which {self.tensor_map[name].name} changes too", "keep one of them"
            )
        self.tensor_map[name] = tensors

    def _refuse(self, name: str, what: str, hint: str) -> None:
        self.problems.append(Problem(f"{self.file.path}: {name}", what, hint))


def packs_as_now(version: str | None) -> bool:
    """Whether that version of PEFT packs experts as 0.19 and later do: before, in and out were swapped."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return match is not None and (int(match[1]), int(match[2])) >= _FIRST_PACKING


_PACKING_HINT = "say how it is packed with: finetune import-adapter ADAPTER --packing ..., and use what that writes"
_RANK_HINT = "adapter_config.json (r, rank_pattern) and the weights do not belong together, or the weights are cut"


def _why_unknown(name: str) -> tuple[str, str]:
    reasons = {
        "lora_embedding_": "trains token embeddings",
        "lora_magnitude_vector": "is a DoRA magnitude",
        "modules_to_save": "is a whole module saved beside the factors",
        ".bias": "is a bias",
    }
    for word, reason in reasons.items():
        if word in name:
            return f"{reason}, which cannot be read", "train or convert the adapter without it"
    return "is not a tensor of a PEFT LoRA adapter", "remove it, or save the adapter with save_pretrained"
