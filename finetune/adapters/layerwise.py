"""Adapters on a model of which one layer is in memory, with the others left on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from finetune.adapters.config import ExpertLoraConfig
from finetune.adapters.files import AdapterFiles
from finetune.adapters.hosting import with_our_layers
from finetune.architecture.names import EXPERT_MATRICES, expert_matrix
from finetune.errors import AdapterError, Problem


def attach_to_layer(
    model: nn.Module, adapters: Sequence[AdapterFiles], shares: Sequence[float], prefix: str
) -> PeftModel | None:
    """`model` with the adapters' factors under the module `prefix`, all of them active, their sum computed.

    model: one in which only `prefix`, a decoder layer, is real.  shares: factor of each adapter's delta.
    Adapters with factors for single experts, which no live layer hosts, are added to the weights themselves.
    None when no other adapter has factors there. Raises AdapterError when a factor finds no place.
    """
    hosted = []
    for files, share in zip(adapters, shares, strict=True):
        if files.has_single_experts:
            _add_(model, files, share, prefix)
        else:
            hosted.append((files, share))
    adapted: Any = None
    active = []
    for number, (files, share) in enumerate(hosted):
        here = [key for key in files.file.tensors if key.startswith(f"base_model.model.{prefix}.")]
        if not here:
            continue
        name = f"adapter{number}"
        config = _config(files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if adapted is None:
                adapted = get_peft_model(model, config, adapter_name=name)
            else:
                adapted.add_adapter(name, config)
            loaded = set_peft_model_state_dict(adapted, {key: files.file.read(key) for key in here}, adapter_name=name)
        _check(files, loaded, name)
        _scale_(adapted, name, share)
        active.append(name)
    if adapted is None:
        return None
    adapted.base_model.set_adapter(active, inference_mode=True)
    return adapted.eval()


def _config(files: AdapterFiles) -> LoraConfig:
    """Ours, or stock PEFT's for an adapter that our live layers do not host (on the router, for one)."""
    try:
        config: LoraConfig = with_our_layers(ExpertLoraConfig.load(files.path))
    except AdapterError:
        config = LoraConfig.from_pretrained(str(files.path))
    config.inference_mode = True
    return config


@torch.no_grad()
def _add_(model: nn.Module, files: AdapterFiles, share: float, prefix: str) -> None:
    """Weights += share * scale * B A, for every factor under `prefix`."""
    for name in files.tensor_map:
        if not name.startswith(f"{prefix}."):
            continue
        delta = files.read(name)
        if (found := expert_matrix(name.removesuffix(".weight"))) is not None:
            matrices = EXPERT_MATRICES[found.projection]
            bank_EOI = model.get_parameter(f"{found.bank}.{found.projection}")
            weight = bank_EOI[found.expert].chunk(len(matrices))[matrices.index(found.matrix)]
        else:
            weight = model.get_parameter(name)
        weight.add_(delta.rows(slice(None)), alpha=share)


def _check(files: AdapterFiles, loaded: Any, name: str) -> None:
    lost = list(loaded.unexpected_keys)
    empty = [key for key in loaded.missing_keys if f".{name}." in key and "lora_" in key]
    if lost or empty:
        hint = "the adapter and its settings do not belong together"
        what = "has tensors that find no place, or places without a tensor"
        raise AdapterError(Problem(str(files.path), what, hint, (lost + empty)[:3]))


def _scale_(adapted: nn.Module, name: str, share: float) -> None:
    if share == 1.0:
        return
    with torch.no_grad():
        for module in adapted.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and name in scaling:
                scaling[name] *= share
