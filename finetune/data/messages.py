"""What a template makes of a row: a conversation, or a passage of plain text."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

from finetune.data.bad_rows import BadRow
from finetune.data.companions import one_system_prompt, read_before, read_beside
from finetune.data.conversation import Conversation, MessageReader, Passage
from finetune.data.json_text import structured
from finetune.data.templates import (
    JINJA,
    CompletionTemplate,
    DataTemplate,
    FeedbackTemplate,
    MessagesTemplate,
    TextTemplate,
    TurnsTemplate,
    message_shape,
)
from finetune.errors import DataError, shorten
from finetune.models.template_budget import check_length, template_budget

Fields = dict[str, Any]


def interpret(fields: Fields, template: DataTemplate) -> Conversation | Passage:
    """What `template` makes of a row's fields. BadRow names the field that does not fit."""
    for name in template.needs:
        if fields.get(template.column(name)) is None:
            raise misfit(template.column(name), fields, template)
    if isinstance(template, MessagesTemplate):
        return _chat(fields, template)
    assert not isinstance(template, FeedbackTemplate), "rows with feedback are read by data.feedback"
    if isinstance(template, CompletionTemplate) and (turns := _halves(fields, template)):
        return _chat(fields, template, turns)
    texts = _texts(fields, template)
    if isinstance(template, TurnsTemplate):
        return _chat(fields, template, texts)
    if isinstance(template, CompletionTemplate):
        passage = Passage(_render(template.prompt, texts), _render(template.completion, texts))
    else:
        assert isinstance(template, TextTemplate)
        passage = Passage("", _render(template.text, texts))
    _check_passage(passage, template)
    return passage


def _chat(fields: Fields, template: DataTemplate, own: Any = None) -> Conversation:
    """A chat with what stands beside it in the row. own: texts of a turns template, or halves of a completion."""
    reader = MessageReader(template if isinstance(template, MessagesTemplate) else message_shape())
    made = reader.made
    tools, settings = read_beside(fields, template)
    read_before(fields, template, reader)
    before = len(made.messages)
    if isinstance(template, MessagesTemplate):
        reader.read(fields[template.messages], template.messages)
    elif isinstance(template, TurnsTemplate):
        _append_turns(own, template, reader)
    else:
        for name, (messages, trained) in own.items():
            reader.read(messages, name, trained=trained)
    one_system_prompt(made, before)
    conversation = Conversation(made.messages, made.places, made.trained, tools, settings)
    check_ends(conversation)
    return conversation


def _halves(fields: Fields, template: CompletionTemplate) -> dict[str, tuple[list[Any], bool]] | None:
    """Prompt and completion where either is a list of messages; a text in the other half is one turn."""
    names = [template.column(name) for name in template.needs]
    if len(names) != 2:
        return None
    prompt, completion = (structured(fields[name]) if holds_messages(fields[name]) else fields[name] for name in names)
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return {names[0]: (prompt, False), names[1]: (completion, True)}


def holds_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or JSON text of one; other texts are what people wrote."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = structured(value)
        first = structured(value[0]) if isinstance(value, list) and value else None
        return isinstance(first, dict) and message_shape().role_key(first) in first
    return isinstance(value, list)


def misfit(name: str, fields: Fields, template: DataTemplate) -> BadRow:
    """A row that lacks a field."""
    present = ", ".join(key for key, value in fields.items() if value is not None) or "nothing"
    hint = f"template {template.name} reads {', '.join(template.needs + template.knows)}"
    return BadRow(name, f"is missing; the row has {shorten(present)[1:-1]}", hint, reason=f"lacks {name}")


def _check_passage(passage: Passage, template: CompletionTemplate | TextTemplate) -> None:
    if isinstance(template, CompletionTemplate) and not passage.prompt:
        raise BadRow(template.needs[0], "is empty", "write the prompt, or use template text for texts without one")
    if not passage.completion.strip():
        raise BadRow(template.needs[-1], "is empty", "give the row a text to learn, or remove it", passage.completion)


def check_ends(conversation: Conversation) -> None:
    """BadRow for a chat that does not end with an answer, or teaches nothing."""
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
        column = template.column(name)
        value = fields.get(column)
        if value is not None and not isinstance(value, str):
            raise BadRow(column, "is not a text", "write it as text, in quotes", value)
        if not value and name in template.required:
            raise BadRow(column, "is empty", "fill it in, or remove the row")
        texts[name] = value or ""
    return texts


def _append_turns(texts: dict[str, str], template: TurnsTemplate, reader: MessageReader) -> None:
    for index, turn in enumerate(template.turns):
        if turn.when and not texts[turn.when].strip():
            continue
        message = {"role": turn.role, "content": _render(turn.content, texts)}
        reasoning = _render(turn.reasoning, texts) if turn.reasoning else ""
        if reasoning.strip():
            message["reasoning_content"] = reasoning
        reader.append(message, f"turns[{index}] of template {template.name}", trained=turn.role == "assistant")


@cache
def _compiled(text: str) -> jinja2.Template:
    return JINJA.from_string(text)


def _render(text: str, texts: dict[str, str]) -> str:
    where = "the data template"
    try:
        with template_budget(where):
            made = _compiled(text).render(texts)
        return check_length(made, sum(map(len, texts.values())), where)
    except DataError:
        raise
    except Exception as error:  # a template may do anything that Python's operators can
        what = f"makes the data template fail: {type(error).__name__}: {error}"
        raise BadRow("", what, "check the Jinja of the data template", reason="makes the data template fail") from None
