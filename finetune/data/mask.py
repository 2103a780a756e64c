"""Which characters of a rendered chat, and then which tokens, carry loss.

Messages that hold a marker of turns themselves are refused before, so every one of them in the rendered text is a
boundary the chat template wrote. Of a trained turn the loss falls on reasoning, content, tool calls and the closing
token; not on the header, not on an empty think block (unless asked), not on the newline behind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.bad_rows import BadRow
from finetune.data.conversation import Conversation
from finetune.data.markers import CHATML, TEMPLATE_HINT, Markers, Turn

EMPTY_THINK = re.compile(r"<think>\s*</think>\n*")

Span = tuple[int, int]


class Tokens(Protocol):
    """One text as tokens."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """The token ids."""

    def first_from(self, position: int) -> int:
        """The first token that begins at or after the character at `position`; their number when there is none."""


@dataclass(frozen=True)
class Answer:
    """Characters of one assistant turn in a rendered chat.

    begin, end: from behind the header to behind the closing token.
    said: where the turn says something: `begin`, or the end of an empty think block.
    trained: whether it carries loss.
    reasoning_dropped: whether the chat template left its reasoning out.
    reasons: whether it shows reasoning before what it says.
    """

    begin: int
    said: int
    end: int
    trained: bool
    reasoning_dropped: bool
    reasons: bool = False


def find_answers(text: str, chat: Conversation, markers: Markers = CHATML) -> list[Answer]:
    """The assistant turns of `text`, the rendered `chat`.

    Each assistant message must stand in the assistant turn of its order, and every message in the order of the
    chat; BadRow names the one that does not.
    """
    turns = markers.turns(text)
    rendered = [turn for turn in turns if turn.is_answer]
    count = sum(message["role"] == "assistant" for message in chat.messages)
    if len(rendered) != count:
        raise BadRow("", f"is rendered with {len(rendered)} assistant turns instead of {count}", TEMPLATE_HINT)
    answers: list[Answer] = []
    position = 0
    for message, place, trained in zip(chat.messages, chat.places, chat.trained, strict=True):
        if message["role"] != "assistant":
            position = _end_of(message["content"], text, turns, position)
            if position < 0:
                raise BadRow(place, "is not shown by the chat template", TEMPLATE_HINT, message["content"])
            continue
        turn = rendered[len(answers)]
        content, reasoning = split_reasoning(message)
        said_text = text[slice(*turn.text)]
        if turn.begin < position or content not in said_text:
            raise BadRow(place, "is not shown by the chat template", TEMPLATE_HINT, content)
        position = turn.end
        empty = EMPTY_THINK.match(text, *turn.text)
        said = empty.end() if empty else turn.text[0]
        shown = said_text.startswith("<think>") and reasoning in said_text.partition("</think>")[0]
        has_reasoning = bool(reasoning)
        dropped, reasons = has_reasoning and not shown, has_reasoning and shown
        answers.append(Answer(turn.text[0], said, turn.end, trained, dropped, reasons))
    return answers


def _end_of(content: str, text: str, turns: list[Turn], position: int) -> int:
    """Where `content` ends in the first turn but the assistant's that has it at or after `position`; -1 for nowhere."""
    content = content.strip()
    for turn in turns:
        if turn.end > position and not turn.is_answer:
            found = text.find(content, max(position, turn.text[0]), turn.text[1])
            if found >= 0:
                return found + len(content)
    return -1


def split_reasoning(message: dict[str, Any]) -> tuple[str, str]:
    """Content and reasoning of an assistant message, both stripped; reasoning may stand in the content as <think>."""
    content, reasoning = message["content"], message.get("reasoning_content")
    if reasoning is None and "</think>" in content:
        reasoning, _, content = content.partition("</think>")
        reasoning = reasoning.split("<think>")[-1]
    return content.strip(), (reasoning or "").strip()


def tokens_of(span: Span, tokens: Tokens) -> Span:
    """First token and end of the tokens that begin inside `span`.

    A token that begins before the span, in the header, does not count: where an answer starts with a newline, the
    header's newline and the answer's are one token.
    """
    first, end = map(tokens.first_from, span)
    return first, max(first, end)


def token_at(position: int, tokens: Tokens) -> int:
    """The token that holds the character at `position`."""
    first = tokens.first_from(position)
    return first if first < tokens.first_from(position + 1) else first - 1
