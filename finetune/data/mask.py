"""Which characters of a rendered chat, and then which tokens, carry loss.

Messages that hold a marker of turns themselves are refused before, so every one of them in the rendered text is a
boundary the chat template wrote. Of a trained turn the loss falls on reasoning, content, tool calls and the closing
token; not on the header, not on an empty think block (unless asked), not on the newline behind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.data.bad_rows import BadRow
from finetune.data.conversation import Conversation
from finetune.data.markers import CHATML, TEMPLATE_HINT, Markers, Turn

EMPTY_THINK = re.compile(r"<think>\s*</think>\n*")

Span = tuple[int, int]


class Alignment(Protocol):
    """Characters of one tokenized text and its tokens, as `tokenizers.Encoding` has them."""

    ids: list[int]

    def char_to_token(self, char_pos: int) -> int | None:
        """Index of the first token that holds the character."""

    def token_to_chars(self, token_index: int) -> Span | None:
        """Characters that the token stands for."""


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


def tokens_of(span: Span, alignment: Alignment) -> Span:
    """First token and end of the tokens that begin inside `span`.

    A token that begins before the span, in the header, does not count: where an answer starts with a newline, the
    header's newline and the answer's are one token.
    """
    first, end = (_token_from(edge, alignment) for edge in span)
    return first, max(first, end)


def _token_from(position: int, alignment: Alignment) -> int:
    """The first token that begins at or after the character at `position`."""
    token = None
    chars = alignment.token_to_chars(len(alignment.ids) - 1)
    last = chars[1] if chars else 0
    while token is None and position < last:
        token = alignment.char_to_token(position)
        position += 1
    if token is None:
        return len(alignment.ids)
    begin = alignment.token_to_chars(token)
    assert begin is not None
    return token if begin[0] >= position - 1 else _after(token, begin, alignment)


def _after(token: int, chars: Span, alignment: Alignment) -> int:
    """The first token past `token` that begins elsewhere."""
    while token < len(alignment.ids) and alignment.token_to_chars(token) == chars:
        token += 1
    return token
