"""How much work a training step is, by a model's config, and what a card could do of it."""

from __future__ import annotations

from typing import Any

FORMULA = (
    "FLOP of a token: 4 x the frozen weights it meets (forward and the gradient of inputs; attention, router, its "
    "experts, head) + 6 x the LoRA factors it meets (their gradients too) + 7 x layers x heads x head width x row "
    "length (causal attention: half of 2 products forward and 5 backward). What checkpointing repeats is left out."
)
PEAK_TFLOP_PER_S = {"H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0}
"""Of dense 16-bit products, as the makers say; H100 is the SXM one."""


def flop_per_token(config: dict[str, Any], sequence_tokens: int, rank: int) -> float:
    """See FORMULA: 18.1 GFLOP for Qwen3-30B-A3B in rows of 4,096 tokens with rank 16."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    active, layers = config["num_experts_per_tok"], config["num_hidden_layers"]
    products = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]  # q, k, v, o
    experts = [(hidden, 2 * width), (width, hidden)]
    layer = sum(i * o for i, o in products) + active * sum(i * o for i, o in experts) + hidden * config["num_experts"]
    factors = sum(rank * (i + o) for i, o in products) + active * sum(rank * (i + o) for i, o in experts)
    frozen = layers * layer + hidden * config["vocab_size"]
    return 4.0 * frozen + 6.0 * layers * factors + 7.0 * layers * queries * sequence_tokens


def peak_tflop_per_s(card: str) -> float | None:
    """What the maker says of a card; None for one that is not listed."""
    return next((rate for name, rate in PEAK_TFLOP_PER_S.items() if name in card.replace("-", " ").split()), None)
