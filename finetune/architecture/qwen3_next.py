"""Qwen3-Next: Gated DeltaNet in most layers, gated attention in the others, a shared expert beside the routed ones."""

from __future__ import annotations

from finetune.architecture.family import Family, Live

SIZES: dict[str, int | None] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 5632,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
}

QWEN3_NEXT = Family(
    model_types=("qwen3_next",),
    title="Qwen3-Next",
    sizes=SIZES,
    live=Live("transformers.models.qwen3_next.modeling_qwen3_next", "Qwen3NextExperts", "Qwen3NextTopKRouter"),
    gated_attention=True,
    linear_attention={"in_proj_qkvz": (2, 2, 0), "in_proj_ba": (0, 0, 2)},
)
