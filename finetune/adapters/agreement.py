"""Whether an adapter's file, a model's adapter and their expert plans belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.delta import Delta
from finetune.adapters.expert_lora import LoraExperts
from finetune.adapters.factor import Factor
from finetune.adapters.files import AdapterFiles
from finetune.errors import AdapterError, Problem, first_of

MOST_PROBLEMS = 8


RESUME = "resume with the adapter and experts sections of the run, or start anew without --resume"


def check_same_plan(model: PeftModel, folder: str | Path, hint: str = RESUME) -> None:
    """Raise AdapterError unless the adapter in `folder` has the targets, ranks and experts of the model's active one.

    Resuming with others would hand the optimizer state to other parameters; torch's fused AdamW corrupts memory then.
    hint: what to do about it.
    """
    files, config, name = AdapterFiles.open(folder), ExpertLoraConfig.load(folder), model.active_adapter
    now_config: Any = model.peft_config[name]
    now, then = stock_shapes(model, name), {key: info.shape for key, info in files.file.tensors.items()}
    problems = [
        Problem(f"{folder}: {key}", f"is {then.get(key, 'absent')} in the file, {now.get(key, 'absent')} now", hint)
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    ]
    if not problems:
        for layer_name, experts in _experts_by_layer(model, name).items():
            trained = config.experts_of(layer_name, files.num_experts[layer_name])
            ranks_before, ranks_now = config.ranks_of(layer_name), now_config.ranks_of(layer_name)
            if trained != experts or ranks_before != ranks_now:
                then_now = (trained, experts) if trained != experts else (ranks_before, ranks_now)
                kind = "experts" if trained != experts else "ranks"
                what = f"trained {kind} {list(then_now[0] or ())} before and {list(then_now[1] or ())} now"
                problems.append(Problem(f"{folder}: {layer_name}", what, hint))
    if problems:
        raise AdapterError(*first_of(problems, MOST_PROBLEMS, str(folder)))


def check_consumed(model: PeftModel, adapter_name: str, files: AdapterFiles) -> None:
    """Raise AdapterError unless every tensor of the file has its place in the model, and every place its tensor."""
    expected, found = stock_shapes(model, adapter_name), files.file.tensors
    hint = "the adapter was made for a model of another shape"
    problems = [
        Problem(f"{files.path}: {key}", "has no place in the model" if key in found else "is missing", hint)
        for key in sorted(expected.keys() ^ found.keys())
    ]
    if problems:
        raise AdapterError(*first_of(problems, MOST_PROBLEMS, str(files.path)))


def stock_shapes(model: PeftModel, adapter_name: str) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor that saving one adapter of the model writes."""
    shapes = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for side in ("lora_A", "lora_B", "lora_delta"):
            holder: Any = getattr(module, side, {})
            if adapter_name in holder:
                factor = holder[adapter_name]
                shape = factor.stock_shape if isinstance(factor, Factor | Delta) else tuple(factor.weight.shape)
                shapes[f"{name}.{side}.weight"] = shape
    return shapes


def _experts_by_layer(model: PeftModel, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Trained experts of each wrapped bank, by the bank's name in the base model."""
    return {
        name: trained.experts
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraExperts) and (trained := module.trained(adapter_name)) is not None
    }
