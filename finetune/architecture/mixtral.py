"""Mixtral: few wide experts, which the hub keeps as w1, w3 and w2 of a `block_sparse_moe`."""

from __future__ import annotations

from finetune.architecture.family import Family, Hub, Live

MIXTRAL = Family(
    model_types=("mixtral",),
    title="Mixtral",
    sizes={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "intermediate_size": 14336,
        "vocab_size": 32_000,
        "max_position_embeddings": 131_072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    nullable=frozenset({"head_dim", "num_key_value_heads"}),
    live=Live(
        "transformers.models.mixtral.modeling_mixtral",
        "MixtralExperts",
        "MixtralTopKRouter",
        normalizes=True,
        float32_weights=True,
    ),
    expert_width="intermediate_size",
    query_key_norms="none",
    hub=Hub(
        renames=((".block_sparse_moe.", ".mlp."),),
        matrices={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    ),
)
