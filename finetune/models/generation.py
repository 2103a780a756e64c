"""Replies of a chat model, as they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from finetune.config.model_files import CHAT_END
from finetune.models.template_budget import check_length, template_budget

Message = dict[str, str]


@dataclass(frozen=True)
class Generation:
    """How to write a reply.

    thinking: let the model reason before it answers.
    max_new_tokens: tokens at most, reasoning included.
    temperature: 0 takes the most likely token; None leaves it to the checkpoint's generation_config.json.
    """

    thinking: bool = False
    max_new_tokens: int = 512
    temperature: float | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None:
            options |= {"do_sample": True, "temperature": self.temperature}
        return options


class _Callback(TextStreamer):
    """Hands every finished piece of text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> str:
    """A chat as the tokenizer's own template writes it. settings: of `apply_chat_template`.

    Raises DataError for a template that takes too much, and otherwise whatever it raises itself.
    """
    where = "the model's chat template"
    with template_budget(where):
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    return check_length(text, sum(len(str(message.get("content"))) for message in messages), where)


def stops_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Tokens that end a reply: those the checkpoint names, the end of a turn, and what an adapter was taught."""
    configs: Any = getattr(model, "peft_config", {})
    taught = [end for config in configs.values() for end in getattr(config, "ends", ())]
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = configured if isinstance(configured, (list, tuple)) else [configured]
    turn_end = tokenizer.get_added_vocab().get(CHAT_END)
    every = (*named, tokenizer.eos_token_id, turn_end, *taught)
    return list(dict.fromkeys(each for each in every if isinstance(each, int))) or None


def reply(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation: Generation,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's next turn; `on_text` gets its pieces as they are written."""
    text = render_chat(tokenizer, list(messages), add_generation_prompt=True, enable_thinking=generation.thinking)
    prompt: Any = tokenizer([text], add_special_tokens=False, return_tensors="pt")
    prompt = prompt.to(next(model.parameters()).device)
    streamer = _Callback(tokenizer, on_text) if on_text else None
    options: dict[str, Any] = {**generation.options(), "eos_token_id": stops_of(model, tokenizer)}
    with torch.inference_mode():
        output = model.generate(**prompt, **options, streamer=streamer)  # type: ignore[operator]
    new_tokens = output[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(new_tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()
