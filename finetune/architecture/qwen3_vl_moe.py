"""Qwen3-VL-MoE and the thinker of Qwen3-Omni: the text model of Qwen3-MoE inside a model that sees and hears."""

from __future__ import annotations

from finetune.architecture.family import Around, Family, Hub, Live

_SIZES: dict[str, int | None] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "vocab_size": 151_936,
    "decoder_sparse_step": 1,
}

QWEN3_VL_MOE = Family(
    model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
    title="Qwen3-VL-MoE",
    sizes={
        **_SIZES,
        "num_hidden_layers": 24,
        "intermediate_size": 5632,
        "max_position_embeddings": 128_000,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
    },
    nullable=frozenset({"head_dim"}),
    live=Live(
        "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
        "Qwen3VLMoeTextExperts",
        "Qwen3VLMoeTextTopKRouter",
        normalizes=True,
    ),
    text="text_config",
    around=Around(),
    hub=Hub(prefix="model.language_model.", transposed=True),
)

QWEN3_OMNI_MOE = Family(
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
    title="Qwen3-Omni-MoE",
    sizes={
        **_SIZES,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 3584,
        "max_position_embeddings": 32_768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    live=Live(
        "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe",
        "Qwen3OmniMoeThinkerTextExperts",
        "Qwen3OmniMoeThinkerTextTopKRouter",
    ),
    text="thinker_config.text_config",
    around=Around(config="thinker_config", towers=("model.visual", "model.audio_tower")),
    hub=Hub(renames=(("thinker.", ""),)),
)
