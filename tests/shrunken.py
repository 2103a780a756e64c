"""Real models shrunken: the same kind and ratios at widths that train in seconds, in a folder as the hub's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.architecture.shape import ModelShape, shape_of
from tests.families.models import save
from tests.tiny import save_as_hub, tiny_dense, tiny_moe

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen3-moe"
SHARDS = 3
KEY_VALUE_HEADS = 2
HEAD_DIM = 8
EXPERT = 64
EXPERTS_PER_ACTIVE = 2


@dataclass(frozen=True)
class Size:
    """What is left of a real model; `active` experts of a token, all of them when None."""

    layers: int = 2
    hidden: int = 128
    active: int | None = None


def _qwen3(hidden: int, layers: int, heads: int, key_value_heads: int, width: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 128,
        "intermediate_size": width,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
        **more,
    }


def _experts(width: int, experts: int = 128, active: int = 8) -> dict[str, Any]:
    return {"num_experts": experts, "num_experts_per_tok": active, "moe_intermediate_size": width}


def _qwen3_moe(hidden: int, layers: int, heads: int, width: int, **more: Any) -> dict[str, Any]:
    kind = {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {**_qwen3(hidden, layers, heads, 4, 6144), **kind, **_experts(width), **more}


_DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "shared_expert_intermediate_size": 512,
    "head_dim": 256,
}

REAL: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 8, 12_288),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(2048, 48, 32, 768),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _qwen3_moe(2048, 48, 32, 768, max_position_embeddings=262_144),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(4096, 94, 64, 1536),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {
        **_qwen3(2048, 48, 16, 2, 5120),
        **_DELTA_NET,
        **_experts(512, 512, 10),
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
    },
    "Qwen/Qwen3.6-35B-A3B": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            **_qwen3(2048, 40, 16, 2, 0, vocab_size=248_320),
            **_DELTA_NET,
            **_experts(512, 256),
            "model_type": "qwen3_5_moe_text",
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
        },
        "vision_config": {"depth": 27},
    },
    "Qwen/Qwen3-VL-30B-A3B-Instruct": {
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        "text_config": {
            **{key: size for key, size in _qwen3_moe(2048, 48, 32, 768).items() if key != "tie_word_embeddings"},
            "model_type": "qwen3_vl_moe_text",
            "max_position_embeddings": 262_144,
        },
        "vision_config": {"depth": 27},
    },
}
"""Name on the hub -> what its config.json says of sizes."""


def real_shape(name: str) -> ModelShape:
    """Sizes of a real model."""
    return shape_of(REAL[name], name)


def write_shrunken(name: str, path: Path, size: Size | None = None) -> Path:
    """A random bfloat16 checkpoint of the kind of `name`, with the embedded model's tokenizer.

    Kept: model type, layer kinds, names; of a Qwen3 also active experts, heads per key-value head, tied or not, no
    attention bias, the base of RoPE, several shards. Scaled: everything else.
    """
    shape, size = real_shape(name), size or Size()
    if shape.model_type not in ("qwen3", "qwen3_moe"):
        return save(shape.model_type, path, torch.bfloat16)
    embedded = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
    settings = {
        "vocab_size": embedded["vocab_size"],
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": KEY_VALUE_HEADS * shape.heads // shape.kv_heads,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 3 * size.hidden,
        "max_position_embeddings": 2048,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.05,
        **{key: embedded[key] for key in ("bos_token_id", "eos_token_id")},
    }
    if shape.experts:
        active = size.active or shape.experts_per_token
        experts = _experts(EXPERT, EXPERTS_PER_ACTIVE * active, active)
        save_as_hub(tiny_moe(dtype=torch.bfloat16, **settings, **experts), path, SHARDS)
    else:
        save_as_hub(tiny_dense(dtype=torch.bfloat16, **settings), path, SHARDS)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TOKENIZER / file, path / file)
    return path
