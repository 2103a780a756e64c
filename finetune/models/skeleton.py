"""A live model without its weights, for those who bring them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.architecture.registry import is_moe
from finetune.architecture.shape import CONFIG
from finetune.config.rope import RopeScaling
from finetune.models.attention import prepare_packed_rows, transformers_name
from finetune.models.hf_types import PreTrainedModel
from finetune.models.loading import as_model_error, check_size, read_settings, scale_positions_
from finetune.models.text_model import leave_out_towers_, live_class, live_config, text_config, text_model


def skeleton(
    folder: str | Path,
    dtype: torch.dtype,
    attention_implementation: str = "sdpa",
    rope_scaling: RopeScaling | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint folder in eval mode, frozen, all its weights on the meta device.

    What its config.json says about quantization is left out: whoever brings the weights knows.
    Raises ModelError for a config.json that transformers cannot use here.
    """
    from transformers import GenerationConfig

    check_size(folder, read_settings(Path(folder) / CONFIG))
    with as_model_error(folder):
        config = live_config(folder)
    scale_positions_(config.get_text_config(), rope_scaling)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    attention = transformers_name(attention_implementation)
    with as_model_error(folder), torch.device("meta"):
        model = live_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    leave_out_towers_(model)
    inner: Any = text_model(model)[1]
    inner.rotary_emb = type(inner.rotary_emb)(config=inner.config)  # computed, and not among the weights
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if is_moe(config):
        text_config(model).output_router_logits = False
    model.rope_scaled = rope_scaling
    return prepare_packed_rows(model).eval().requires_grad_(False)
