"""How well a model predicts rows it is shown: loss and greedy exact match, without building full logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

IGNORED = -100


@dataclass(frozen=True)
class RowScore:
    """One row under teacher forcing.

    nll: summed negative log-likelihood of its loss tokens, in nats.
    tokens: number of its loss tokens.
    exact: whether the most likely token is the right one at every loss token, which is to say that greedy
        decoding from the same prompt would write exactly the same answer.
    """

    nll: float
    tokens: int
    exact: bool


@dataclass(frozen=True)
class Score:
    """Many rows together: token-weighted mean loss in nats, and the share of rows answered exactly."""

    rows: int
    tokens: int
    loss: float
    exact_match: float

    @classmethod
    def of(cls, scores: Sequence[RowScore]) -> Score:
        """The score of at least one row."""
        assert scores, "a score needs rows"
        tokens = sum(score.tokens for score in scores)
        return cls(
            rows=len(scores),
            tokens=tokens,
            loss=sum(score.nll for score in scores) / tokens,
            exact_match=sum(score.exact for score in scores) / len(scores),
        )


def score_rows(model: nn.Module, rows: Sequence[dict[str, Any]], *, batch_tokens: int = 4096) -> list[RowScore]:
    """Scores of `rows`, in their order.

    rows: each with `input_ids` and `labels` of one length; labels are -100 where no loss is asked.
    batch_tokens: padded tokens per forward.

    A mean over batches depends on the batch size; these scores do not. The model is left in the mode it was in.
    """
    scores: list[RowScore | None] = [None] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            for batch in _batches_by_length(rows, batch_tokens):
                for index, score in zip(batch, _score_batch(model, [rows[i] for i in batch]), strict=True):
                    scores[index] = score
    finally:
        model.train(was_training)
    return [score for score in scores if score is not None]


def _batches_by_length(rows: Sequence[dict[str, Any]], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers grouped so that rows of like length share a batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index]["input_ids"]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[RowScore]:
    device = next(model.parameters()).device
    length = max(len(row["input_ids"]) for row in rows)
    ids_BS = torch.zeros(len(rows), length, dtype=torch.long)
    labels_BS = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    mask_BS = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids_BS[i, :n] = torch.tensor(row["input_ids"])
        labels_BS[i, :n] = torch.tensor(row["labels"])
        mask_BS[i, :n] = 1
    ids_BS, labels_BS, mask_BS = ids_BS.to(device), labels_BS.to(device), mask_BS.to(device)

    causal: Any = model
    if hasattr(causal, "get_base_model"):  # a PeftModel
        causal = causal.get_base_model()
    hidden_BSH = causal.model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).last_hidden_state
    targets_BS = labels_BS[:, 1:]
    loss_BS = targets_BS != IGNORED
    nll_N, right_N = _predict(causal.lm_head, hidden_BSH[:, :-1][loss_BS], targets_BS[loss_BS])

    counts = loss_BS.sum(1).tolist()
    return [
        RowScore(nll=float(nll.double().sum()), tokens=count, exact=bool(right.all()))
        for nll, right, count in zip(nll_N.split(counts), right_N.split(counts), counts, strict=True)
    ]


def _predict(lm_head: nn.Module, hidden_NH: Tensor, target_N: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,) and whether the target is the most likely token (N,), `chunk` tokens at a time."""
    nll, right = [], []
    for hidden, target in zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True):
        logits = lm_head(hidden).float()
        nll.append(nn.functional.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(nll), torch.cat(right)


def head_operands(hidden_NH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that a linear layer would multiply in, the head whole."""
    if isinstance(head_VH, DTensor):
        head_VH = head_VH.full_tensor()
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_VH.dtype
    return hidden_NH.to(dtype), head_VH.to(dtype)
