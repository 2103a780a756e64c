"""What a template makes of a row: a conversation, or a passage of plain text."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

from finetune.data.bad_rows import BadRow
from finetune.data.conversation import Conversation, Passage, read_conversation
from finetune.data.templates import (
    JINJA,
    CompletionTemplate,
    DataTemplate,
    MessagesTemplate,
    TextTemplate,
    TurnsTemplate,
    suggest_template,
)
from finetune.errors import shorten

Fields = dict[str, Any]


def interpret(fields: Fields, template: DataTemplate) -> Conversation | Passage:
    """What `template` makes of a row's fields. BadRow names the field that does not fit."""
    for name in template.needs:
        if fields.get(name) is None:
            raise _misfit(name, fields, template)
    if isinstance(template, MessagesTemplate):
        conversation = read_conversation(fields, template)
        _check_ends(conversation)
        return conversation
    texts = _texts(fields, template)
    if isinstance(template, TurnsTemplate):
        conversation = _made_up(texts, template)
        _check_ends(conversation)
        return conversation
    if isinstance(template, CompletionTemplate):
        passage = Passage(_render(template.prompt, texts), _render(template.completion, texts))
    else:
        assert isinstance(template, TextTemplate)
        passage = Passage("", _render(template.text, texts))
    _check_passage(passage, template)
    return passage


def _misfit(name: str, fields: Fields, template: DataTemplate) -> BadRow:
    present = ", ".join(key for key, value in fields.items() if value is not None) or "nothing"
    hint = (
        _fitting_hint(fields, template)
        or f"template {template.name} reads {', '.join(template.needs + template.knows)}"
    )
    return BadRow(name, f"is missing; the row has {shorten(present)[1:-1]}", hint, reason=f"lacks {name}")


def _fitting_hint(fields: Fields, template: DataTemplate) -> str | None:
    """Which other template the row fits, if there is one."""
    other = suggest_template(fields)
    if other in (None, template.name):
        return None
    return f"the row fits template {other}: write `template: {other}` in the recipe"


def _check_passage(passage: Passage, template: CompletionTemplate | TextTemplate) -> None:
    if isinstance(template, CompletionTemplate) and not passage.prompt:
        raise BadRow(template.needs[0], "is empty", "write the prompt, or use template text for texts without one")
    if not passage.completion.strip():
        raise BadRow(template.needs[-1], "is empty", "give the row a text to learn, or remove it", passage.completion)


def _check_ends(conversation: Conversation) -> None:
    messages, places = conversation.messages, conversation.places
    for message, place in zip(messages, places, strict=True):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(place, "is an assistant turn that says nothing", "write the answer, or remove the row")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(places[-1], "ends a chat without an assistant turn", "add the answer to learn, or remove the row")
    if messages[-1]["role"] != "assistant":
        what = f"is a turn of the {messages[-1]['role']} at the end of a chat"
        raise BadRow(
            places[-1], what, "end the row with the assistant's answer", reason="does not end with an assistant turn"
        )
    if not any(conversation.trained):
        raise BadRow("", "carries no loss: every answer has weight 0", "give an answer weight 1, or remove the row")


def _texts(fields: Fields, template: TurnsTemplate | CompletionTemplate | TextTemplate) -> dict[str, str]:
    texts = {}
    for name in template.required + template.optional:
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            fitting = _fitting_hint(fields, template) if isinstance(value, list) else None
            raise BadRow(name, "is not a text", fitting or "write it as text, in quotes", value)
        texts[name] = value or ""
    for name in template.required:
        if not texts[name]:
            raise BadRow(name, "is empty", "fill it in, or remove the row")
    return texts


def _made_up(texts: dict[str, str], template: TurnsTemplate) -> Conversation:
    messages, places = [], []
    for index, turn in enumerate(template.turns):
        if turn.when and not texts[turn.when].strip():
            continue
        message = {"role": turn.role, "content": _render(turn.content, texts)}
        reasoning = _render(turn.reasoning, texts) if turn.reasoning else ""
        if reasoning.strip():
            message["reasoning_content"] = reasoning
        messages.append(message)
        places.append(f"turns[{index}] of template {template.name}")
    return Conversation(messages, places, [message["role"] == "assistant" for message in messages])


@cache
def _compiled(text: str) -> jinja2.Template:
    return JINJA.from_string(text)


def _render(text: str, texts: dict[str, str]) -> str:
    try:
        return _compiled(text).render(texts)
    except Exception as error:  # a template may do anything that Python's operators can
        what = f"makes the data template fail: {type(error).__name__}: {error}"
        raise BadRow("", what, "check the Jinja of the data template", reason="makes the data template fail") from None
