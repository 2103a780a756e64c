"""OLMoE: experts only, norms over all queries and keys, routing weights as the softmax leaves them."""

from __future__ import annotations

from finetune.architecture.family import Family, Live

OLMOE = Family(
    model_types=("olmoe",),
    title="OLMoE",
    sizes={
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "intermediate_size": 2048,
        "vocab_size": 50_304,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    nullable=frozenset({"num_key_value_heads"}),
    live=Live("transformers.models.olmoe.modeling_olmoe", "OlmoeExperts", "OlmoeTopKRouter"),
    expert_width="intermediate_size",
    query_key_norms="all",
)
