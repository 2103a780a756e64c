"""Replies to many prompts, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune.models.generation import Generation, stops_of

SEED = 0
"""Of the draws, where a temperature asks for them."""


@dataclass(frozen=True)
class Reply:
    """What was written behind one prompt.

    text: without control tokens.  tokens: how many were written, the one that ends it not counted.
    at_limit: whether it ran into the most tokens that a reply may have, and so has no end.
    """

    text: str
    tokens: int
    at_limit: bool


def write_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """One reply to each prompt of token ids, in their order; the longest prompts first, which need the most memory.

    Prompts of a batch are padded on the left, where no token looks. The model is left in the mode it was in, and the
    random numbers of the process as they were.
    """
    replies: dict[int, Reply] = {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(SEED)
            for begin in range(0, len(order), batch_size):
                batch = order[begin : begin + batch_size]
                written = _write(model, tokenizer, [prompts[index] for index in batch], generation, device)
                replies |= zip(batch, written, strict=True)
                if progress is not None:
                    progress(len(replies), len(order))
    finally:
        model.train(was_training)
    return [replies[index] for index in range(len(prompts))]


def _write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    device: torch.device,
) -> list[Reply]:
    """The replies of one batch."""
    stops = stops_of(model, tokenizer)
    length, pad = max(map(len, prompts)), tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    ids_BS = torch.full((len(prompts), length), pad)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BS[row, length - len(prompt) :] = 1
    options: dict[str, Any] = {**generation.options(), "eos_token_id": stops, "pad_token_id": pad, "use_cache": True}
    output_BS = model.generate(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), **options)  # type: ignore[operator]
    return [_reply(tokenizer, ids, set(stops or ())) for ids in output_BS[:, length:].tolist()]


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    return Reply(text, len(ids[:end]), end is None)
