"""config.json of published models, and recipes for them."""

from __future__ import annotations

from typing import Any

from finetune.architecture.shape import ModelShape, shape_of
from finetune.config.schema import Recipe

DENSE = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151_936}
MOE = DENSE | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4}


def _dense(hidden: int, layers: int, heads: int, width: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return DENSE | sizes | {"num_key_value_heads": 8, "intermediate_size": width, "tie_word_embeddings": tied}


def _moe(hidden: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return MOE | sizes | {"moe_intermediate_size": width}


CONFIGS = {
    "0.6B": _dense(1024, 28, 16, 3072, True),
    "4B": _dense(2560, 36, 32, 9728, True),
    "8B": _dense(4096, 36, 32, 12_288, False),
    "32B": _dense(5120, 64, 64, 25_600, False),
    "30B-A3B": _moe(2048, 48, 32, 768),
    "235B-A22B": _moe(4096, 94, 64, 1536),
    "qwen3_next": {"model_type": "qwen3_next"},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text"},
}
EXPERTS = {"experts": ["gate_up_proj", "down_proj"]}


def shape(name: str) -> ModelShape:
    return shape_of(CONFIGS[name], "config.json")


def recipe(path: str = "model", **sections: dict[str, Any]) -> Recipe:
    """A recipe of which some sections have fields of their own."""
    data = {"train": "rows.jsonl", "max_length": 4096}
    given = {"model": {"path": path}, "output": {"dir": "run"}, "data": data, "adapter": EXPERTS}
    return Recipe.model_validate({**given, **{name: {**given.get(name, {}), **s} for name, s in sections.items()}})
