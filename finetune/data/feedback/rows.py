"""What a row with feedback holds: a prompt, and completions of it that are compared, labeled, or yet to be written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from finetune.config.objectives import RowKind
from finetune.data.bad_rows import BadRow
from finetune.data.companions import as_switch, one_system_prompt, read_before, read_beside
from finetune.data.conversation import Conversation, MessageReader
from finetune.data.feedback.extract import shared_text, shared_turns
from finetune.data.json_text import structured
from finetune.data.messages import check_ends, holds_messages, misfit
from finetune.data.templates import Feedbacks, LabeledTemplate

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt and its completions; all are chats, or all are texts.

    prompt: a chat that asks for an answer, or a text.
    completions: whole chats that begin with the prompt, whose messages carry no loss, or texts that follow it.
    label: whether the completion is good, of labeled rows.
    """

    prompt: Conversation | str
    completions: tuple[Conversation, ...] | tuple[str, ...]
    label: bool | None = None


def read_feedback(fields: Fields, template: Feedbacks) -> Feedback:
    """What `template` makes of a row's fields. BadRow names the field that does not fit."""
    for name in template.needs:
        if fields.get(name) is None:
            raise misfit(name, fields, template)
    found = _Reader(fields, template).read()
    if isinstance(template, LabeledTemplate):
        label = as_switch(fields[template.label])
        if label is None:
            raise BadRow(
                template.label, "is neither true nor false", "write true for a good one", fields[template.label]
            )
        found = replace(found, label=label)
    return found


@dataclass
class _Reader:
    """Reads one row."""

    fields: Fields
    template: Feedbacks
    values: dict[str, Any] = field(default_factory=dict)

    def read(self) -> Feedback:
        names = (self.template.prompt, *self.template.completions)
        self.values = {name: _value(self.fields.get(name)) for name in names}
        plain = all(value is None or isinstance(value, str) for value in self.values.values())
        if plain and self.template.texts == "plain":
            return self._texts()
        return self._chats()

    def _texts(self) -> Feedback:
        prompt, names = self.values[self.template.prompt], self.template.completions
        texts = [self.values[name] for name in names]
        if prompt is None:
            if len(texts) != 2:
                raise misfit(self.template.prompt, self.fields, self.template)
            end = shared_text(*texts)
            prompt, texts = texts[0][:end], [text[end:] for text in texts]
        if not prompt.strip():
            raise BadRow(self.template.prompt, "is empty", "write the prompt, or remove the row")
        for name, text in zip(names, texts, strict=True):
            if not text.strip():
                raise BadRow(name, "is empty", "write the completion, or remove the row")
        return Feedback(prompt, tuple(texts))

    def _chats(self) -> Feedback:
        name, names = self.template.prompt, self.template.completions
        given = self.values[name]
        implicit = self._completions_hold_the_prompt()
        if given is None and not implicit:
            what = "is missing, and the completions do not begin with it"
            raise BadRow(name, what, "write the question that is answered", reason=f"lacks {name}")
        if implicit:
            return self._taken_apart([self._chat(each, None) for each in names])
        prompt = self._chat(name, "user")
        if prompt.messages[-1]["role"] == "assistant":
            hint = "move the answer into the completion, or remove it"
            raise BadRow(prompt.places[-1], "is an answer at the end of the prompt", hint)
        return Feedback(prompt, tuple(self._behind(prompt, each) for each in names))

    def _completions_hold_the_prompt(self) -> bool:
        """Whether the completions are whole conversations: lists that do not begin with an answer."""
        whole = [self._begins_with_a_question(name) for name in self.template.completions]
        if any(whole) and not all(whole):
            name = self.template.completions[whole.index(False)]
            raise BadRow(name, "begins with an answer, and the other completion does not", "write both in one way")
        return bool(whole) and all(whole)

    def _begins_with_a_question(self, name: str) -> bool:
        value = self.values[name]
        first = structured(value[0]) if isinstance(value, list) and value else None
        if not isinstance(first, dict):
            return False
        role = first.get(self.template.shape.role_key(first))
        return isinstance(role, str) and self.template.shape.role_of(role) not in ("assistant", "tool_call", None)

    def _chat(self, name: str, role: str | None) -> Conversation:
        """What stands beside the chat in the row and the messages of a field, a text as one turn of `role`."""
        reader = MessageReader(self.template.shape)
        tools, settings = read_beside(self.fields, self.template)
        read_before(self.fields, self.template, reader)
        before = len(reader.made.messages)
        reader.read(self._messages(name, role), name)
        one_system_prompt(reader.made, before)
        return replace(reader.made, tools=tools, settings=settings)

    def _messages(self, name: str, role: str | None) -> Any:
        value = self.values[name]
        if not isinstance(value, str) or role is None:
            return value
        if not value.strip():
            raise BadRow(name, "is empty", "fill it in, or remove the row")
        return [{"role": role, "content": value}]

    def _taken_apart(self, chats: list[Conversation]) -> Feedback:
        """Whole conversations, whose shared beginning is the prompt; one that is given too must be the same."""
        for chat in chats:
            check_ends(chat)
        first = chats[0]
        if len(chats) == 1:
            end = len(first.messages) - 1
        else:
            messages = [chat.messages for chat in chats]
            end = shared_turns(messages[0], messages[1], lambda message: message["role"] == "assistant")
        self._check_given(first.messages[:end])
        prompt = Conversation(first.messages[:end], first.places[:end], [False] * end, first.tools, first.settings)
        trained = [[False] * end + chat.trained[end:] for chat in chats]
        return Feedback(prompt, tuple(replace(chat, trained=flags) for chat, flags in zip(chats, trained, strict=True)))

    def _check_given(self, messages: list[dict[str, Any]]) -> None:
        given, name = self.values[self.template.prompt], self.template.prompt
        if given is None:
            return
        said = [message["content"].strip() for message in messages]
        if isinstance(given, str):
            fits = given.strip() in said
        else:
            read = self._chat(name, None).messages
            fits = messages[: len(read)] == read
        if not fits:
            hint = "remove the prompt, which the completions hold, or begin these with the answer"
            raise BadRow(name, "is not what the completions begin with", hint, given)

    def _behind(self, prompt: Conversation, name: str) -> Conversation:
        """The whole chat of a prompt and a completion."""
        reader = MessageReader(self.template.shape)
        reader.read(self._messages(name, "assistant"), name)
        made = reader.made
        if made.messages[0]["role"] != "assistant":
            raise BadRow(made.places[0], "is no answer to the prompt", "begin the completion with the assistant's turn")
        chat = replace(
            prompt,
            messages=prompt.messages + made.messages,
            places=prompt.places + made.places,
            trained=[False] * len(prompt.trained) + made.trained,
        )
        check_ends(chat)
        return chat


def _value(value: Any) -> Any:
    """A list of messages, also of a single one and of JSON text; a text as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "{" and isinstance(found := structured(value), dict):
        value = found if holds_messages([found]) else value
    if isinstance(value, dict):
        return [value]
    return structured(value) if holds_messages(value) else value


def kept_columns(fields: Fields, template: Feedbacks) -> Fields:
    """What a prompt's row holds beside the chat, for what judges the answers."""
    beside = template.companions.values()
    return {name: value for name, value in fields.items() if name not in template.columns and name not in beside}


def feedback_kind(fields: Fields) -> RowKind | None:
    """`preference` or `labeled` where a row has their columns under their usual names."""
    if all(fields.get(name) is not None for name in ("chosen", "rejected")):
        return "preference"
    if all(fields.get(name) is not None for name in ("prompt", "completion", "label")):
        return "labeled"
    return None
