"""The frozen weights below an adapter: which ones it runs over, and what packed ones cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.adapters.files import SIDECAR, AdapterFiles
from finetune.config.packed_folder import PackedSettings, read_packed_settings
from finetune.config.schema import QuantizeSection
from finetune.errors import AdapterError, Problem
from finetune.models.live import PackedBank
from finetune.quant.linear import is_linear_4bit

LoadedWeights = Literal["packed", "original"]
"""Of an adapter that was trained on packed weights: those, or the ones that the base stores."""


@dataclass(frozen=True)
class Base:
    """What to load below an adapter: a folder or hub name, and how to hold its weights (as they are stored if None)."""

    path: str
    revision: str | None
    section: QuantizeSection | None


def trained_packing(files: AdapterFiles) -> QuantizeSection | None:
    """How the base was packed in the adapter's run; None for a base in 16 bit, and where nobody said."""
    if files.quantize is None:
        return None
    try:
        return QuantizeSection.model_validate(files.quantize)
    except ValueError as error:
        what = f"is not a quantize section ({' '.join(str(error).split())[:200]})"
        hint = "restore the file that training wrote"
        raise AdapterError(Problem(f"{files.path}/{SIDECAR}: quantize", what, hint)) from None


def choose_base(
    files: AdapterFiles, base: str | Path | None, base_weights: LoadedWeights, dtype: torch.dtype | None
) -> Base:
    """Where the weights below an adapter come from.

    base: one that was asked for; a packed folder is taken as it is.  dtype: as for `load`; what packed weights are
    decoded to is the run's when None.
    Raises AdapterError when there is none, or when it is packed and `base_weights` are to be the original ones.
    """
    if base_weights not in get_args(LoadedWeights):
        raise AdapterError(Problem("base_weights", "is neither packed nor original", "name one of them", base_weights))
    section = trained_packing(files) if base_weights == "packed" else None
    if section is not None and dtype is not None:
        section = section.model_copy(update={"compute_dtype": None})
    if base is not None:
        packed = read_packed_settings(base)
        if packed is not None and base_weights == "original":
            hint = f"give the model it was made from, {packed.base}, or leave --base-weights out"
            raise AdapterError(Problem(str(base), "is a packed model, which holds no original weights", hint))
        return Base(str(base), None, _decoded_alike(section) if packed is not None else section)
    if section is not None and files.packed_in and _is_the_packed_base(files, section):
        return Base(files.packed_in, None, section)
    if not files.base_model:
        hint = "name it with --base; or load the base yourself and use load_adapter"
        raise AdapterError(Problem(str(files.path), "does not name its base model", hint))
    return Base(files.base_model, files.config.revision, section)


def _decoded_alike(section: QuantizeSection | None) -> QuantizeSection | None:
    """What holds for another packed model too."""
    return None if section is None else QuantizeSection(compute_dtype=section.compute_dtype)


def _is_the_packed_base(files: AdapterFiles, section: QuantizeSection) -> bool:
    """Whether the folder that the run's packed weights came from still holds them."""
    packed: PackedSettings | None = read_packed_settings(files.packed_in or "")
    if packed is None or packed.fingerprint != files.base_fingerprint:
        return False
    return not list(packed.contradictions(section))


def frozen_text(model: Any) -> str | None:
    """What the user should know of the frozen weights of a model that was loaded; None when they are simply its own."""
    packed_as, name = getattr(model, "packed_as", None), getattr(model, "name_or_path", "")
    if packed_as is not None:
        kinds = [kind for kind in ("attention", "experts") if packed_as[kind]]
        how = f"{packed_as['scheme']} ({' and '.join(kinds)}), decoded to {packed_as['compute_dtype']}"
        origin = getattr(model, "packed_in", None)
        return f"frozen weights: {name} in {how}, " + (f"from {origin}" if origin else "packed while loading")
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    trained = next((settings for config in configs.values() if (settings := getattr(config, "quantize", None))), None)
    if trained is not None:
        return f"frozen weights: {name} as it is stored; the adapter was trained on its {trained['scheme']} form"
    return None


def refuse_to_merge_packed(model: PeftModel) -> PeftModel:
    """`model`, whose merging methods raise AdapterError before they change anything where a packed weight is adapted.

    PEFT would go module by module: through 4-bit attention, rounding it again, up to the first packed experts.
    """
    tuner: Any = model.base_model
    for method in ("merge_adapter", "merge_and_unload"):
        setattr(tuner, method, _Guarded(tuner, getattr(type(tuner), method)))
    return model


@dataclass(frozen=True)
class _Guarded:
    """A merging method of a PEFT tuner."""

    tuner: Any
    method: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = {n: m.get_base_layer() for n, m in self.tuner.named_modules() if isinstance(m, BaseTunerLayer)}
        packed = [name for name, base in layers.items() if isinstance(base, PackedBank) or is_linear_4bit(base)]
        if packed:
            hint = "save the adapter and merge it into the original weights: finetune merge ADAPTER --output DIR"
            what = f"{len(packed)} adapted weights are packed, and nothing can be added to those; nothing was changed"
            raise AdapterError(Problem("merge", what, hint))
        return self.method(self.tuner, *args, **kwargs)
