"""A tiny random model of every family, written by transformers in the layout that the hub has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_TEXT: dict[str, Any] = {
    "vocab_size": 704,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def _text(name: str, **settings: Any) -> Callable[[], Any]:
    """A text model: its class and config are `name`ForCausalLM and `name`Config."""

    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**_TEXT, **settings})
        return getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=torch.float32)

    return build


def _with_vision(name: str, **settings: Any) -> Callable[[], Any]:
    """A model that sees images, around the same text model."""

    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(text_config={**_TEXT, **settings}, vision_config=_VISION)
        model = getattr(transformers, f"{name}ForConditionalGeneration")
        return model._from_config(config, dtype=torch.float32)

    return build


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": _text("Qwen3", intermediate_size=48, head_dim=8),
    "qwen3_moe": _text("Qwen3Moe", **_EXPERTS, head_dim=8, norm_topk_prob=True),
    "qwen3_next": _text("Qwen3Next", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=40),
    "qwen3_5": _with_vision("Qwen3_5", **_LINEAR, intermediate_size=48),
    "qwen3_5_moe": _with_vision("Qwen3_5Moe", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=40),
    "mixtral": _text("Mixtral", intermediate_size=24, num_local_experts=6),
    "olmoe": _text("Olmoe", intermediate_size=24, num_experts=6, num_experts_per_tok=2),
}


def save(model_type: str, folder: Path) -> Path:
    """The family's model as a checkpoint folder with a tokenizer, and a head for several tokens that nothing reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODELS[model_type]().save_pretrained(folder)
        for name in SIDE_FILES:
            shutil.copy(ROOT / "examples/tiny-qwen3-moe" / name, folder)
        if model_type.startswith(("qwen3_next", "qwen3_5")):
            tensors = tensors_of(folder)
            tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(8, 8)
            tensors["mtp.norm.weight"] = torch.randn(8)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of one file, as it is stored."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def plain(folder: Path) -> Any:
    """The text model as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def config_of(folder: Path) -> dict[str, Any]:
    """Content of config.json."""
    return json.loads((folder / "config.json").read_text())
