"""What a row holds that nothing reads: columns, and keys of its messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from finetune.data.conversation import Conversation, Passage
from finetune.data.templates import CompletionTemplate, DataTemplate, FeedbackTemplate, MessagesTemplate
from finetune.errors import Problem

Fields = dict[str, Any]
KEYS = frozenset(("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "id"))
"""Keys of messages that are read, or that say nothing to a model."""


def unread_columns(
    fields: Fields, found: Conversation | Passage, template: DataTemplate, chat_template: str | None = None
) -> list[str]:
    """Columns with content that went nowhere, by name; keys of messages as `messages[].key`.

    found: what `template` made of the row.  chat_template: the model's own, which may read documents and the like;
    None takes it to read everything.
    """
    beside = template.companions.values() if isinstance(found, Conversation) else ()
    unread = [
        name
        for name, value in fields.items()
        if name not in template.columns and name not in beside and _has_content(value)
    ]
    if isinstance(found, Conversation) and chat_template is not None:
        unread += _told_in_vain(found, template, chat_template)
    return unread


def unread_problem(source: str, unread: Mapping[str, int]) -> Problem:
    """Columns that nothing reads, as an error."""
    hint = "name them in data.columns or in a template of your own, remove them, or write data.unread: note"
    return Problem(source, f"has columns that nothing reads: {in_words(unread)}", hint)


def _told_in_vain(chat: Conversation, template: DataTemplate, chat_template: str) -> list[str]:
    """Settings that the model's chat template does not mention."""
    column = template.companions.get("chat_template_kwargs")
    unread = [
        name if name in ("documents", "enable_thinking") else f"{column}.{name}"
        for name, value in chat.settings.items()
        if _has_content(value) and not mentions(chat_template, name)
    ]
    if chat.tools and not mentions(chat_template, "tools"):
        unread.append("tools")
    keys = {
        key
        for message in chat.messages
        for key in message.keys() - KEYS
        if _has_content(message[key]) and not (key == "name" and message["role"] == "tool")
    }
    if isinstance(template, MessagesTemplate):
        place = template.messages
    else:
        first = isinstance(template, CompletionTemplate | FeedbackTemplate)
        place = template.column(template.needs[0]) if first else "history"
    return unread + [f"{place}[].{key}" for key in sorted(keys) if not mentions(chat_template, key)]


@lru_cache(1024)
def mentions(chat_template: str, name: str) -> bool:
    """Whether a chat template has a variable, key or attribute of that name."""
    return re.search(rf"\b{re.escape(name)}\b", chat_template) is not None


def _has_content(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def in_words(counts: Mapping[str, int]) -> str:
    """Such as `source (12 rows), id (1 row)`."""
    return ", ".join(f"{name} ({count:,} row{'' if count == 1 else 's'})" for name, count in counts.items())
