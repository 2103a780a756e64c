"""Qwen3: dense models, and mixtures of experts such as Qwen3-30B-A3B and Qwen3-Coder-30B-A3B."""

from __future__ import annotations

from finetune.architecture.family import Family, Live
from finetune.architecture.names import ATTENTION, EMBEDDING, EXPERTS, HEAD, MLP, NORM, ROUTER

_GGUF_NAMES = {
    EMBEDDING: "token_embd",
    NORM: "output_norm",
    HEAD: "output",
    "input_layernorm": "attn_norm",
    f"{ATTENTION}.q_proj": "attn_q",
    f"{ATTENTION}.k_proj": "attn_k",
    f"{ATTENTION}.v_proj": "attn_v",
    f"{ATTENTION}.o_proj": "attn_output",
    f"{ATTENTION}.q_norm": "attn_q_norm",
    f"{ATTENTION}.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    f"{MLP}.gate_proj": "ffn_gate",
    f"{MLP}.up_proj": "ffn_up",
    f"{MLP}.down_proj": "ffn_down",
}

QWEN3 = Family(
    model_types=("qwen3",),
    title="Qwen3",
    sizes={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
    },
    live=None,
    gguf="qwen3",
    gguf_names=_GGUF_NAMES,
    exports=None,
)

QWEN3_MOE = Family(
    model_types=("qwen3_moe",),
    title="Qwen3-MoE",
    sizes={
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "intermediate_size": 6144,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    live=Live("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeTopKRouter"),
    gguf="qwen3moe",
    gguf_names={
        **_GGUF_NAMES,
        ROUTER: "ffn_gate_inp",
        f"{EXPERTS}.gate_proj": "ffn_gate_exps",
        f"{EXPERTS}.up_proj": "ffn_up_exps",
        f"{EXPERTS}.down_proj": "ffn_down_exps",
    },
    exports=None,
)
