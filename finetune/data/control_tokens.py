"""Tokens that steer the model: texts must not hold them, and the tokenizer must have those of a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.conversation import Conversation, Passage
from finetune.data.markers import Markers, markers_of
from finetune.errors import DataError, Problem

HINT = "such a token would steer the model: remove it, or write it differently"
RAW_HINT = HINT + "; a data template of your own may say control_tokens: allow"


def check_tokenizer(tokenizer: Any, *, chats: bool, answers: Markers | None = None) -> Markers | Problem:
    """What answers stand between in chats, or the problem for rows that are chats.

    answers: as the recipe names it. DataError when the tokenizer cannot encode text, or, with `chats`, for the problem.
    """
    problems = []
    if not tokenizer.is_fast:
        problems.append(Problem("tokenizer", "is not a fast one", "the model folder needs a tokenizer.json"))
    markers = markers_of(tokenizer, answers)
    if chats and isinstance(markers, Problem):
        problems.append(markers)
    if tokenizer.eos_token_id is None:
        problems.append(Problem("tokenizer", "has no end-of-text token", "set eos_token in tokenizer_config.json"))
    if problems:
        raise DataError(*problems)
    return markers


class ControlTokens:
    """The tokenizer's special tokens, such as <|im_start|>, and what answers stand between.

    Tags like <think> and <tool_call> are ordinary text.
    """

    def __init__(self, tokenizer: Any, markers: Markers | Problem) -> None:
        added = tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(texts)
        self._pattern = _any_of(texts | set(markers.texts)) if isinstance(markers, Markers) else self._special

    def refuse_in_chat(self, chat: Conversation) -> None:
        """BadRow when a message or a tool holds a control token, or think tags that the chat template would misread."""
        for message, place in zip(chat.messages, chat.places, strict=True):
            for key, value in message.items():
                self._refuse(value, place if key == "content" else f"{place}.{key}", HINT)
            if message["role"] == "assistant":
                _check_think_tags(message["content"], message.get("reasoning_content"), place)
        self._refuse(chat.tools, "tools", HINT)

    def refuse_in_passage(self, passage: Passage, fields: Sequence[str]) -> None:
        """BadRow when prompt or completion, made from `fields`, hold a control token."""
        for text, field in ((passage.prompt, fields[0]), (passage.completion, fields[-1])):
            if match := self._special.search(text):
                raise BadRow(field, "holds a control token", RAW_HINT, match.group())

    def _refuse(self, value: Any, place: str, hint: str) -> None:
        if isinstance(value, str):
            if match := self._pattern.search(value):
                raise BadRow(place, "holds a control token", hint, match.group())
        elif isinstance(value, dict):
            for key, item in value.items():
                self._refuse(str(key), place, hint)
                self._refuse(item, f"{place}.{key}", hint)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._refuse(item, f"{place}[{index}]", hint)


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """The longest of them that stands at a place."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _check_think_tags(content: str, reasoning: str | None, place: str) -> None:
    hint = "an answer has one think block; put reasoning into reasoning_content alone"
    opens = content.lstrip().startswith("<think>")
    if reasoning is not None:
        if "</think>" in reasoning:
            raise BadRow(place, "has </think> inside its reasoning", hint, reasoning)
        if reasoning.strip() and opens:
            raise BadRow(place, "has its reasoning twice, apart and in the text", hint, content)
    elif content.count("</think>") > 1:
        raise BadRow(place, "has more than one </think>", hint, content)
    elif opens and "</think>" not in content:
        raise BadRow(place, "opens <think> and never closes it", "the answer may be cut off: remove the row", content)
