"""What adapter_config.json of stock PEFT says: targets, rank and scale of every module, and what we refuse."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.architecture.plain_file import read_plain
from finetune.errors import AdapterError, Problem

MAX_BYTES = 2**26
ADAPTER_CONFIG = "adapter_config.json"
WHOLE_EXPERTS = "FINETUNE_EXPERT_WEIGHTS"
"""The peft_type of our adapters that hold whole experts: stock PEFT refuses it instead of leaving those out."""

_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA also rescales the base weight",
    "modules_to_save": "whole modules are saved beside the factors",
    "lora_bias": "lora_B has a bias",
    "fan_in_fan_out": "weights are stored transposed",
    "trainable_token_indices": "token embeddings are trained",
    "layer_replication": "layers are repeated",
    "use_qalora": "QALoRA pools the input",
    "alora_invocation_tokens": "the adapter is active for some tokens only",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_HINT = "train or convert the adapter without it; only W + scale * B A can be read"


@dataclass(frozen=True)
class StockConfig:
    """The fields of adapter_config.json that decide how the tensors are read.

    by_unsloth: whether it says that Unsloth made it.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    exclude_modules: tuple[str, ...] | str
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    base_model: str | None
    revision: str | None
    peft_version: str | None
    by_unsloth: bool = False

    @classmethod
    def open(cls, folder: Path) -> StockConfig:
        """Reads `folder`/adapter_config.json. Raises AdapterError with every setting that cannot be honored."""
        path = folder / ADAPTER_CONFIG
        content = read_json_object(path)
        problems = _refusals(path, content) + _malformed(path, content)
        if problems:
            raise AdapterError(*problems)
        layers = content.get("layers_to_transform")
        return cls(
            path=path,
            rank=content["r"],
            alpha=content["lora_alpha"],
            rank_pattern=content.get("rank_pattern") or {},
            alpha_pattern=content.get("alpha_pattern") or {},
            rslora=bool(content.get("use_rslora")),
            target_modules=_names(content.get("target_modules")),
            target_parameters=tuple(content.get("target_parameters") or ()),
            exclude_modules=_names(content.get("exclude_modules")),
            layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
            layers_pattern=_as_tuple(content.get("layers_pattern")),
            base_model=content.get("base_model_name_or_path"),
            revision=content.get("revision"),
            peft_version=content.get("peft_version"),
            by_unsloth=bool((content.get("auto_mapping") or {}).get("unsloth_fixed"))
            or (content.get("base_model_name_or_path") or "").startswith("unsloth/"),
        )

    def rank_of(self, key: str) -> int:
        """Rank of a module, or of a projection of an expert bank, by its full name."""
        return _first_match(self.rank_pattern, key, self.rank)

    def scale_of(self, key: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(key)
        alpha = _first_match(self.alpha_pattern, key, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets_parameter(self, key: str) -> bool:
        """Whether PEFT would wrap this parameter through `target_parameters`."""
        return any(key == target or key.endswith(f".{target}") for target in self.target_parameters)

    def targets_module(self, key: str) -> bool:
        """Whether PEFT would wrap this module through `target_modules`."""
        if _selects(self.exclude_modules, key) or not _selects(self.target_modules, key):
            return False
        if not self.layers or isinstance(self.target_modules, str) or key in self.target_modules:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, key))), None)
        return found is not None and int(found.group(1)) in self.layers


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an adapter folder. Raises AdapterError."""
    try:
        content = json.loads(read_plain(path, MAX_BYTES))
    except FileNotFoundError:
        raise AdapterError(Problem(str(path), "is missing", "give the folder of a saved adapter")) from None
    except (OSError, ValueError, RecursionError) as problem:
        hint = "the file is damaged: copy or save the adapter again"
        raise AdapterError(Problem(str(path), "is not JSON", hint, str(problem))) from None
    if not isinstance(content, dict):
        raise AdapterError(Problem(str(path), "is not a JSON object", "save the adapter again", content))
    return content


def _refusals(path: Path, content: dict[str, Any]) -> list[Problem]:
    problems = []
    if content.get("peft_type") not in ("LORA", WHOLE_EXPERTS):
        what = "is not a LoRA adapter"
        problems.append(Problem(f"{path}: peft_type", what, "only LoRA can be read", content.get("peft_type")))
    if content.get("bias") not in (None, "none"):
        problems.append(Problem(f"{path}: bias", "biases are trained beside the factors", _HINT, content["bias"]))
    start = content.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        what = "the base weights were changed when the adapter was made"
        hint = "save it with PEFT's path_initial_model_for_weight_conversion first"
        problems.append(Problem(f"{path}: init_lora_weights", what, hint, start))
    for name, value in content.items():
        if value and name in _REFUSED:
            problems.append(Problem(f"{path}: {name}", _REFUSED[name], _HINT, value))
        elif value and name not in _KNOWN and not (name == "loftq_config" and start != "loftq"):
            problems.append(Problem(f"{path}: {name}", "is a setting we do not know how to honor", _HINT, value))
    return problems


def _malformed(path: Path, content: dict[str, Any]) -> list[Problem]:
    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)

    checks = {
        "r": _is_rank(content.get("r")),
        "lora_alpha": _is_alpha(content.get("lora_alpha")),
        "rank_pattern": _is_pattern(content.get("rank_pattern") or {}, _is_rank),
        "alpha_pattern": _is_pattern(content.get("alpha_pattern") or {}, _is_alpha),
        "target_parameters": texts(content.get("target_parameters") or []),
        "target_modules": isinstance(content.get("target_modules") or "", str) or texts(content["target_modules"]),
        "exclude_modules": isinstance(content.get("exclude_modules") or "", str) or texts(content["exclude_modules"]),
        "base_model_name_or_path": isinstance(content.get("base_model_name_or_path") or "", str),
        "revision": isinstance(content.get("revision") or "", str),
        "peft_version": isinstance(content.get("peft_version") or "", str),
        "auto_mapping": isinstance(content.get("auto_mapping") or {}, dict),
    }
    hint = "save the adapter again with PEFT"
    return [
        Problem(f"{path}: {name}", "has no usable value", hint, content.get(name))
        for name, valid in checks.items()
        if not valid
    ]


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**20


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: Any, is_valid: Any) -> bool:
    if not isinstance(value, dict) or not all(is_valid(item) for item in value.values()):
        return False
    try:
        for key in value:
            re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


def _first_match(patterns: dict[str, Any], key: str, default: Any) -> Any:
    """peft.utils.other.get_pattern_key: the first pattern that matches the end of the key, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return patterns.get(key, default)


def _selects(names: tuple[str, ...] | str, key: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def _names(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value or ())


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
