"""A chat as a row holds it, read into messages that chat templates understand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.templates import MessagesTemplate
from finetune.data.tool_calls import read_tool_calls, read_tools

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, ready for `tokenizer.apply_chat_template(messages, tools=tools)`.

    messages: each with role and content, assistant turns perhaps with reasoning_content and tool_calls.
    places: where in the row each message came from, for error messages.
    trained: whether the message carries loss; True for assistant turns only.
    """

    messages: list[dict[str, Any]]
    places: list[str]
    trained: list[bool]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """Text outside a chat; `prompt` is empty for plain text."""

    prompt: str
    completion: str


def read_conversation(fields: Fields, template: MessagesTemplate) -> Conversation:
    """The messages of a row; BadRow names the message and the key that cannot be read."""
    return _Reader(fields, template).conversation()


class _Reader:
    """Reads the messages of one row."""

    def __init__(self, fields: Fields, template: MessagesTemplate) -> None:
        self.fields, self.template = fields, template
        self.keys = {template.role, template.content, template.tool_calls, template.weight, *template.reasoning, None}

    def conversation(self) -> Conversation:
        template = self.template
        value = _from_json(self.fields[template.messages])
        if not isinstance(value, list):
            raise BadRow(template.messages, "is not a list of messages", self._shape(), value)
        if not value:
            raise BadRow(template.messages, "is empty", "a chat needs a question and an answer")
        made = Conversation([], [], [], self._tools())
        system = self.fields.get(template.system) if template.system else None
        if system is not None and not isinstance(system, str):
            raise BadRow(str(template.system), "is not a text", "write the system prompt as text", system)
        if system:
            self._append(made, {"role": "system", "content": system}, str(template.system), trained=False)
        for index, raw in enumerate(value):
            self._read(made, raw, f"{template.messages}[{index}]")
        return made

    def _tools(self) -> list[Any] | None:
        name = self.template.tools
        return read_tools(self.fields.get(name), name) if name else None

    def _shape(self) -> str:
        roles = next(iter(self.template.roles))
        return f'a message is an object such as {{"{self.template.role}": "{roles}", "{self.template.content}": "..."}}'

    def _read(self, made: Conversation, raw: Any, place: str) -> None:
        template = self.template
        if not isinstance(raw, dict):
            raise BadRow(place, "is not a message", self._shape(), raw)
        named = raw.get(template.role)
        role = template.roles.get(named) if isinstance(named, str) else None
        if role is None:
            hint = f"roles of template {template.name} are {', '.join(template.roles)}"
            if named is None:
                raise BadRow(f"{place}.{template.role}", "is missing", hint)
            raise BadRow(f"{place}.{template.role}", "is not a role", hint, named)
        trained = self._weight(raw, place) and role in ("assistant", "tool_call")
        if role == "tool_call":
            self._append_tool_call(made, raw.get(template.content), f"{place}.{template.content}", trained)
            return
        calls = raw.get(template.tool_calls) if template.tool_calls else None
        message: dict[str, Any] = {"role": role, "content": self._content(raw, place, optional=bool(calls))}
        if role == "assistant" and (reasoning := self._reasoning(raw, place)) is not None:
            message["reasoning_content"] = reasoning
        if calls:
            if role != "assistant":
                raise BadRow(
                    f"{place}.{template.tool_calls}", "is only for the assistant", "move it to the assistant's turn"
                )
            message["tool_calls"] = read_tool_calls(calls, f"{place}.{template.tool_calls}")
        if raw.get("function_call") is not None:
            hint = 'write "tool_calls": [{"function": {"name": ..., "arguments": ...}}]'
            raise BadRow(f"{place}.function_call", "is the old shape of tool calls", hint)
        rest = {key: item for key, item in raw.items() if key not in self.keys and item is not None}
        self._append(made, message | {k: v for k, v in rest.items() if k not in message}, place, trained=trained)

    def _append(self, made: Conversation, message: dict[str, Any], place: str, *, trained: bool) -> None:
        made.messages.append(message)
        made.places.append(place)
        made.trained.append(trained)

    def _append_tool_call(self, made: Conversation, content: Any, place: str, trained: bool) -> None:
        """A call in a turn of its own belongs to the assistant's text before it, if there is one."""
        value = _from_json(content)
        calls = read_tool_calls(value if isinstance(value, list) else [value], place)
        if made.messages and made.messages[-1]["role"] == "assistant" and "tool_calls" not in made.messages[-1]:
            made.messages[-1]["tool_calls"] = calls
            return
        self._append(made, {"role": "assistant", "content": "", "tool_calls": calls}, place, trained=trained)

    def _weight(self, raw: dict[str, Any], place: str) -> bool:
        weight = raw.get(self.template.weight) if self.template.weight else None
        if weight not in (None, 0, 1):
            hint = "1 trains the answer, 0 leaves it without loss"
            raise BadRow(f"{place}.{self.template.weight}", "is neither 0 nor 1", hint, weight)
        return weight is None or bool(weight)

    def _reasoning(self, raw: dict[str, Any], place: str) -> str | None:
        for key in self.template.reasoning:
            if (value := raw.get(key)) is not None:
                if not isinstance(value, str):
                    raise BadRow(f"{place}.{key}", "is not a text", "write the reasoning as text", value)
                return value
        return None

    def _content(self, raw: dict[str, Any], place: str, *, optional: bool) -> str:
        key = self.template.content
        value = raw.get(key)
        if value is None and optional:
            return ""
        if value is None:
            raise BadRow(f"{place}.{key}", "is missing", f"write what the turn says, as `{key}`")
        if isinstance(value, list):
            return "".join(_part(part, f"{place}.{key}[{i}]") for i, part in enumerate(value))
        if not isinstance(value, str):
            raise BadRow(f"{place}.{key}", "is not a text", "write it as text, in quotes", value)
        return value


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    hint = 'only text is trained: {"type": "text", "text": "..."}; leave out images and sound'
    raise BadRow(place, "is no text", hint, part.get("type") if isinstance(part, dict) else part)


def _from_json(value: Any) -> Any:
    """A list or object that a table keeps as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
