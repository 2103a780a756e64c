"""The log-probabilities that TRL's losses are made of, by our own function: labelled tokens alone, tile by tile.

TRL's own multiplies by the head three times and asks the device which tokens have labels, which the host waits for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from finetune.errors import Problem, TrainingError
from finetune.kernels.log_probs import log_probs
from finetune.models.scoring import IGNORED, head_operands

SCORED = "scored"


@dataclass(frozen=True)
class NamesScored:
    """A collator whose batches say which tokens predict a labelled one, so that no device has to be asked."""

    collate: Callable[[Any], dict[str, Any]]

    def __call__(self, rows: Any) -> dict[str, Any]:
        """The batch, and `scored`: places of those tokens (N,) in its labels, row after row."""
        batch = self.collate(rows)
        return {**batch, SCORED: scored_places(batch["labels"])}


def scored_places(labels_BS: Tensor) -> Tensor:
    """Places (N,) in the flattened labels of the tokens whose next one has a label in the same row."""
    next_BS = torch.full_like(labels_BS, IGNORED)
    next_BS[:, :-1] = labels_BS[:, 1:]
    return (next_BS.flatten() != IGNORED).nonzero().squeeze(1)


def score_by_tiles(model: PeftModel) -> None:
    """Let the forward that TRL's trainer has given `model` score labelled tokens alone, by `log_probs`.

    Batches of `NamesScored` spare the device the question. Without `fused_lm_head` the forward stays what it was.
    Entropy, which nothing here reads, is NaN. Raises TrainingError for a head that is adapted or trains.
    """
    base: Any = model.get_base_model()
    _check_head(base.lm_head)
    theirs = base.forward

    @functools.wraps(type(base).forward)  # generate() checks its arguments against the signature
    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        scored: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        hidden_BSH = base.model(*args, **kwargs).last_hidden_state
        place_N = scored_places(labels) if scored is None else scored
        with maybe_gather_lm_head_ctx(base.lm_head.weight, None):
            hidden_NH, head_VH = head_operands(hidden_BSH.flatten(0, 1).index_select(0, place_N), base.lm_head.weight)
            logp_N, right_N = log_probs(hidden_NH, head_VH, labels.flatten().index_select(0, place_N + 1))
        zeros_T = logp_N.new_zeros(labels.numel())
        return FusedCausalLMOutput(
            log_probs=zeros_T.index_copy(0, place_N, logp_N).view_as(labels)[:, :-1],
            is_top1=zeros_T.bool().index_copy(0, place_N, right_N).view_as(labels)[:, :-1],
            label_mask=labels[:, 1:] != IGNORED,
            entropy=(zeros_T + torch.nan).view_as(labels)[:, :-1],
        )

    base.forward = forward


def _check_head(head: Any) -> None:
    """The head is a plain frozen matrix: what is computed for any other would be wrong."""
    weight: Any = getattr(head, "weight", None)
    if type(head) is not nn.Linear or weight is None or weight.requires_grad or getattr(head, "bias", None) is not None:
        hint = "leave lm_head out of what is adapted or trained"
        raise TrainingError(Problem("lm_head", "is no frozen matrix, which the loss needs", hint, type(head).__name__))
