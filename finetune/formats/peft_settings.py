"""adapter_config.json of an exported adapter: its targets, for PEFT and the servers."""

from __future__ import annotations

import json
from typing import Any

from finetune.adapters.stock_config import ADAPTER_CONFIG
from finetune.architecture.names import EXPERT_PROJECTIONS, EXPERTS, expert_matrix, in_layer
from finetune.formats.factors import Factors

PEFT_VERSION = "0.21.2"  # expert banks are packed as in 0.19 and later


def settings_file(factors: Factors, content: dict[str, Any]) -> dict[str, bytes]:
    """adapter_config.json by its name. content: targets, ranks and alphas."""
    files = factors.plan.adapters[0]
    settings = {
        "base_model_name_or_path": files.base_model or str(factors.plan.base.path),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **content,
    }
    return {ADAPTER_CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()}


def module_targets(factors: Factors, modules: list[str]) -> list[str]:
    """Last names, where every module of that name in the base is meant; full names otherwise."""
    named = [name.removesuffix(".weight") for name in factors.plan.base.weights if name.endswith("weight")]
    named = [name for name in named if in_layer(name) or "." not in name]  # a tower beside the text model is not meant
    if not any(expert_matrix(module) for module in modules):
        named = [name for name in named if not expert_matrix(name)]
    targets: list[str] = []
    for last in sorted({module.rpartition(".")[2] for module in modules}):
        meant = [module for module in modules if module.endswith(f".{last}") or module == last]
        every = [name for name in named if name.endswith(f".{last}") or name == last]
        targets += [last] if set(meant) == set(every) else meant
    return targets


def parameter_targets(factors: Factors, parameters: list[str]) -> list[str]:
    """Names without the layer, where every layer's bank is meant; full names otherwise."""
    matrices = (expert_matrix(name.removesuffix(".weight")) for name in factors.plan.base.weights)
    banks = {matrix.bank for matrix in matrices if matrix is not None}
    common: list[str] = []
    for last in (f"{EXPERTS}.{parameter}" for parameter in EXPERT_PROJECTIONS):
        meant = [name for name in parameters if name.endswith(last)]
        common += [last] if meant and len(meant) == len(banks) else meant
    return sorted(common + [name for name in parameters if name.endswith(".weight")])


def exact_pattern(key: str) -> str:
    """A key of rank_pattern and alpha_pattern for one module alone."""
    return key.replace(".", r"\.")


def as_number(value: float) -> float | int:
    """Whole numbers without a point, as PEFT writes them."""
    return int(value) if float(value).is_integer() else value
