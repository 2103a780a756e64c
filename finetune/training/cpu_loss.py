"""The log-probabilities that TRL's loss is made of, by our own function where TRL has no kernel: on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from finetune.kernels.log_probs import log_probs
from finetune.models.scoring import IGNORED


def score_by_tiles(model: PeftModel) -> None:
    """Let the forward that TRL's trainer has given `model` score labelled tokens alone, by `log_probs`.

    Without `fused_lm_head` the forward stays what it was. Entropy, which nothing here reads, is NaN.
    """
    base: Any = model.get_base_model()
    theirs = base.forward

    @functools.wraps(type(base).forward)  # generate() checks its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        hidden_BSH = base.model(*args, **kwargs).last_hidden_state
        target_BS = labels[:, 1:]
        scored_BS = target_BS != IGNORED
        hidden_NH, head_VH = _operands(hidden_BSH[:, :-1][scored_BS], base.lm_head.weight)
        logp_N, right_N = log_probs(hidden_NH, head_VH, target_BS[scored_BS])
        zeros_BS = logp_N.new_zeros(target_BS.shape)
        return FusedCausalLMOutput(
            log_probs=zeros_BS.masked_scatter(scored_BS, logp_N),
            is_top1=zeros_BS.bool().masked_scatter(scored_BS, right_N),
            label_mask=scored_BS,
            entropy=zeros_BS + torch.nan,
        )

    base.forward = forward


def _operands(hidden_NH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that a linear layer would multiply in."""
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_VH.dtype
    return hidden_NH.to(dtype), head_VH.to(dtype)
