"""What of a decoder layer is kept for backward, and what is computed again: `off`, `selective` or `full`.

Selective keeps what is dear to repeat for what it takes: attention's output, the projection behind it, the routing,
and what the experts' operator hands to its backward. Norms, rotary embedding, q, k, v and elementwise work are
repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from finetune.architecture.registry import is_moe
from finetune.models.text_model import text_config

Mode = Literal["off", "selective", "full"]

KEPT = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "finetune::packed_attention",
    "finetune::count_choices",
    "finetune::draw_seed",
    "finetune::expert_mlp",
    "finetune::expert_mlp_slices",
)
"""Operators whose outputs are kept wherever they are called."""

Save, Repeat = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


class Policy:
    """Of `create_selective_checkpoint_contexts`: what to keep of a decoder layer of a model with `config`.

    Products and softmax are told apart by their shapes: the projection behind attention is (heads, hidden), the
    router's (hidden, experts). The top k are taken again from kept probabilities: transformers scales them in place.
    """

    def __init__(self, config: Any) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads * head_dim
        self._products = {(heads, config.hidden_size)}
        self._experts = config.num_experts if is_moe(config) else None
        if self._experts is not None:
            self._products.add((config.hidden_size, self._experts))

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Whether the output of `op` is kept."""
        if not isinstance(op, torch._ops.OpOverload):
            return Repeat
        name = op._schema.name
        if name in KEPT:
            return Save
        if name == "aten::mm":
            return Save if tuple(args[1].shape) in self._products else Repeat
        if name == "aten::_softmax" and args[0].ndim == 2:
            return Save if args[0].shape[1] == self._experts else Repeat
        return Repeat


def checkpoint_options(config: Any, mode: Mode) -> dict[str, Any]:
    """Arguments of `torch.utils.checkpoint.checkpoint` for a decoder layer; `mode` is not off."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, Policy(config))
    return options


def checkpoint_layers_(base: Any, mode: Mode) -> None:
    """Let the decoder layers of `base` keep less in training, by transformers' own means."""
    if mode == "off":
        return
    enable: Callable[..., None] = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable(checkpoint_options(text_config(base), mode))


def checkpointed(layer: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The call of a decoder layer, checkpointed in training."""
    if not layer.training:
        return layer._call_impl(*args, **kwargs)
    return checkpoint(partial(layer._call_impl, **kwargs), *args, **options)
