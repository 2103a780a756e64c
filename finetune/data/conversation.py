"""A chat as a row holds it, read into messages that chat templates understand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.json_text import structured
from finetune.data.templates import REASONING, ROLES, MessagesTemplate
from finetune.data.tool_calls import read_tool_calls

Fields = dict[str, Any]
TEXT_HINT = 'only text is trained: {"type": "text", "text": "..."}; leave out images and sound'


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, ready for `tokenizer.apply_chat_template(messages, tools=tools, **settings)`.

    messages: each with role and content, assistant turns perhaps with reasoning_content and tool_calls.
    places: where in the row each message came from, for error messages.
    trained: whether the message carries loss; True for assistant turns only.
    settings: other settings of the chat template, such as documents or enable_thinking.
    """

    messages: list[dict[str, Any]]
    places: list[str]
    trained: list[bool]
    tools: list[Any] | None = None
    settings: Fields = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passage:
    """Text outside a chat; `prompt` is empty for plain text."""

    prompt: str
    completion: str


class MessageReader:
    """Reads lists of messages, one behind the other, into a conversation.

    template: the keys and roles that messages have; other usual names of a role and its text are understood as well.
    """

    def __init__(self, template: MessagesTemplate) -> None:
        self.template = template
        self.made = Conversation([], [], [])

    def read(self, value: Any, place: str, *, trained: bool = True) -> None:
        """Append the messages of a list, which may be JSON text as may each of them. BadRow says which is none."""
        found = structured(value)
        if not isinstance(found, list):
            raise BadRow(place, "is not a list of messages", self._shape(), value)
        if not found:
            raise BadRow(place, "is empty", "a chat needs a question and an answer")
        for index, raw in enumerate(found):
            self._read(structured(raw), f"{place}[{index}]", trained=trained)

    def append(self, message: dict[str, Any], place: str, *, trained: bool) -> None:
        """Append one message that is in shape already."""
        self.made.messages.append(message)
        self.made.places.append(place)
        self.made.trained.append(trained)

    def _shape(self) -> str:
        roles = next(iter(self.template.roles))
        return f'a message is an object such as {{"{self.template.role}": "{roles}", "{self.template.content}": "..."}}'

    def _read(self, raw: Any, place: str, *, trained: bool) -> None:
        if not isinstance(raw, dict):
            raise BadRow(place, "is not a message", self._shape(), raw)
        role, content = self._role(raw, place), self.template.content_key(raw)
        trained = trained and self._weight(raw, place) and role in ("assistant", "tool_call")
        if role == "tool_call":
            self._append_tool_call(raw.get(content), f"{place}.{content}", trained)
            return
        if len(raw) == 2 and content in raw:  # its role and its text, and nothing else
            self.append(
                {"role": role, "content": _content(raw, content, place, optional=False)}, place, trained=trained
            )
            return
        calls = self._calls(raw, role, place)
        message: dict[str, Any] = {"role": role, "content": _content(raw, content, place, optional=bool(calls))}
        if role == "assistant" and (reasoning := self._reasoning(raw, place)) is not None:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        known = self.template.message_keys(raw)
        rest = {key: item for key, item in raw.items() if key not in known and item is not None}
        self.append(message | {k: v for k, v in rest.items() if k not in message}, place, trained=trained)

    def _role(self, raw: dict[str, Any], place: str) -> str:
        template = self.template
        key = template.role_key(raw)
        named = raw.get(key)
        role = template.role_of(named) if isinstance(named, str) else None
        if role is None:
            hint = f"roles of template {template.name} are {', '.join(dict.fromkeys((*template.roles, *ROLES)))}"
            if named is None:
                raise BadRow(f"{place}.{template.role}", "is missing", hint)
            hint += "; give others in data.columns: {roles: {" + str(named)[:20] + ": assistant}}"
            raise BadRow(f"{place}.{key}", "is not a role", hint, named)
        return role

    def _calls(self, raw: dict[str, Any], role: str, place: str) -> list[dict[str, Any]]:
        """The calls of an answer; `function_call` is one of them, in the shape that came before tool_calls."""
        key = self.template.tool_calls if self.template.tool_calls in raw else "tool_calls"
        value = structured(raw.get(key))
        if not value and raw.get("function_call"):
            key = "function_call"
            value = structured(raw[key])
        if not value:
            return []
        if role != "assistant":
            raise BadRow(f"{place}.{key}", "is only for the assistant", "move it to the assistant's turn")
        return read_tool_calls(value, f"{place}.{key}")

    def _append_tool_call(self, content: Any, place: str, trained: bool) -> None:
        """A call in a turn of its own belongs to the assistant's text before it, if there is one."""
        calls = read_tool_calls(content, place)
        last = self.made.messages[-1] if self.made.messages else None
        if last is not None and last["role"] == "assistant" and "tool_calls" not in last:
            last["tool_calls"] = calls
            return
        self.append({"role": "assistant", "content": "", "tool_calls": calls}, place, trained=trained)

    def _weight(self, raw: dict[str, Any], place: str) -> bool:
        weight = raw.get(self.template.weight) if self.template.weight else None
        if weight not in (None, 0, 1):
            hint = "1 trains the answer, 0 leaves it without loss"
            raise BadRow(f"{place}.{self.template.weight}", "is neither 0 nor 1", hint, weight)
        return weight is None or bool(weight)

    def _reasoning(self, raw: dict[str, Any], place: str) -> str | None:
        """The reasoning under any of its names; blank is as good as absent."""
        found: dict[str, str] = {}
        for key in dict.fromkeys((*self.template.reasoning, *REASONING)):
            value = raw.get(key)
            if value is None:
                continue
            if not isinstance(value, str):
                raise BadRow(f"{place}.{key}", "is not a text", "write the reasoning as text", value)
            if value.strip():
                found[key] = value
        if len(set(found.values())) > 1:
            one, other = list(found)[:2]
            raise BadRow(f"{place}.{other}", f"differs from {one}", "keep one of the two", found[other])
        return next(iter(found.values()), None)


def _content(raw: dict[str, Any], key: str, place: str, *, optional: bool) -> str:
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
    part = structured(part)
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(place, "is no text", TEXT_HINT, part.get("type") if isinstance(part, dict) else part)
