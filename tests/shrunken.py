"""Real Qwen3 models shrunken: the same kind and ratios at widths that train in seconds, in a folder as the hub's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

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


@dataclass(frozen=True)
class Facts:
    """What config.json of a real model says; `experts` is 0 for a dense one, and `width` its MLP's or an expert's."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    width: int
    experts: int = 0
    active: int = 0
    tied: bool = False


REAL = {
    "Qwen/Qwen3-0.6B": Facts(1024, 28, 16, 8, 128, 3072, tied=True),
    "Qwen/Qwen3-30B-A3B": Facts(2048, 48, 32, 4, 128, 768, experts=128, active=8),
    "Qwen/Qwen3-235B-A22B": Facts(4096, 94, 64, 4, 128, 1536, experts=128, active=8),
}


def write_shrunken(name: str, path: Path, size: Size | None = None) -> Path:
    """A random bfloat16 checkpoint of the kind of `name` in several shards, with the embedded model's tokenizer.

    Kept: model type, layer kinds, active experts, heads per key-value head, tied or not, no attention bias, the base of
    RoPE, names. Scaled: everything else. A block of 64 weights fits each width, and H != I.
    """
    facts, size = REAL[name], size or Size()
    embedded = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
    shape = {
        "vocab_size": embedded["vocab_size"],
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": KEY_VALUE_HEADS * facts.heads // facts.key_value_heads,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 3 * size.hidden,
        "max_position_embeddings": 2048,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": facts.tied,
        "initializer_range": 0.05,
        **{key: embedded[key] for key in ("bos_token_id", "eos_token_id")},
    }
    if facts.experts:
        active = size.active or facts.active
        experts = {
            "num_experts": EXPERTS_PER_ACTIVE * active,
            "num_experts_per_tok": active,
            "moe_intermediate_size": EXPERT,
        }
        save_as_hub(tiny_moe(dtype=torch.bfloat16, **shape, **experts), path, SHARDS)
    else:
        save_as_hub(tiny_dense(dtype=torch.bfloat16, **shape), path, SHARDS)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TOKENIZER / file, path / file)
    return path
