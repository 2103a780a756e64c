"""Qwen3.5 and Qwen3.6: the text model of a checkpoint that sees images too; its other towers stay as they are."""

from __future__ import annotations

from finetune.architecture.family import Family, Hub, Live
from finetune.architecture.qwen3_next import SIZES

_PROJECTIONS = {"in_proj_qkv": (2, 1, 0), "in_proj_z": (0, 1, 0), "in_proj_b": (0, 0, 1), "in_proj_a": (0, 0, 1)}
_HUB = Hub(prefix="model.language_model.")
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_SHARED = {name: size for name, size in SIZES.items() if name not in (*_EXPERTS, "decoder_sparse_step")}

QWEN3_5 = Family(
    model_types=("qwen3_5", "qwen3_5_text"),
    title="Qwen3.5",
    sizes={
        **_SHARED,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "vocab_size": 248_320,
    },
    live=None,
    text="text_config",
    gated_attention=True,
    linear_attention=_PROJECTIONS,
    hub=_HUB,
)

QWEN3_5_MOE = Family(
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    title="Qwen3.5-MoE",
    sizes={
        **{name: size for name, size in _SHARED.items() if name != "intermediate_size"},
        "num_hidden_layers": 40,
        "vocab_size": 248_320,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    live=Live(
        "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
        "Qwen3_5MoeExperts",
        "Qwen3_5MoeTopKRouter",
        normalizes=True,
    ),
    text="text_config",
    gated_attention=True,
    linear_attention=_PROJECTIONS,
    hub=_HUB,
)
