"""Columns that stand beside a chat in its row: system prompt, tools, earlier turns, and settings of the template."""

from __future__ import annotations

from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.conversation import Conversation, MessageReader
from finetune.data.json_text import structured
from finetune.data.templates import DataTemplate
from finetune.data.tool_calls import read_tools

Fields = dict[str, Any]
RESERVED = ("conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize")
PAIRS = (
    ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("question", "answer"), ("prompt", "response"),
    ("query", "response"), ("instruction", "output"),
)  # fmt: skip
"""Keys of what was asked and answered, where earlier turns are objects."""
_SWITCHES = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def read_before(fields: Fields, template: DataTemplate, reader: MessageReader) -> None:
    """Put what comes before the row's own turns into the conversation: its system prompt, then its history."""
    column = template.companions.get("system")
    system = fields.get(column) if column else None
    if system is not None and not isinstance(system, str):
        raise BadRow(str(column), "is not a text", "write the system prompt as text", system)
    if system and system.strip():
        reader.append({"role": "system", "content": system}, str(column), trained=False)
    column = template.companions.get("history")
    if column and (history := structured(fields.get(column))):
        _read_history(history, column, reader)


def _read_history(history: Any, column: str, reader: MessageReader) -> None:
    """Earlier turns: messages, or pairs of what was asked and answered."""
    if not isinstance(history, list):
        hint = 'write [["question", "answer"], ...], or messages'
        raise BadRow(column, "is not a list of earlier turns", hint, history)
    for index, turn in enumerate(history):
        place, pair = f"{column}[{index}]", structured(turn)
        if isinstance(pair, dict) and (names := next((each for each in PAIRS if each == tuple(pair)), None)):
            pair = [pair[name] for name in names]
        if isinstance(pair, dict):
            reader.read([pair], place)
            reader.made.places[-1] = place
            continue
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(place, "is neither a message nor a question with its answer", 'write ["...", "..."]', turn)
        reader.append({"role": "user", "content": pair[0]}, place, trained=False)
        reader.append({"role": "assistant", "content": pair[1]}, place, trained=True)


def one_system_prompt(made: Conversation, before: int) -> None:
    """Let the system prompt come first, and once. BadRow when one beside the chat and one in it differ.

    before: how many messages stand beside the chat.
    """
    columns: tuple[list[Any], ...] = (made.messages, made.places, made.trained)
    if before == 0 or len(made.messages) == before or made.messages[before]["role"] != "system":
        return
    if made.messages[0]["role"] == "system":
        first, second = made.messages[0]["content"], made.messages[before]["content"]
        if first.strip() != second.strip():
            hint = f"keep one of the two, or write both into {made.places[0]}"
            raise BadRow(made.places[before], f"is a second system prompt, beside {made.places[0]}", hint, second)
        for column in columns:
            del column[before]
        return
    for column in columns:
        column.insert(0, column.pop(before))


def read_beside(fields: Fields, template: DataTemplate) -> tuple[list[Any] | None, Fields]:
    """The tools on offer, and other settings of the chat template."""
    tools = None
    for name in ("tools", "functions"):
        column = template.companions.get(name)
        if column and tools is None:
            tools = read_tools(fields.get(column), column)
    settings: Fields = {}
    column = template.companions.get("documents")
    if column and (documents := structured(fields.get(column))):
        if not isinstance(documents, list):
            raise BadRow(column, "is not a list", 'write documents as [{"title": "...", "text": "..."}]', documents)
        settings["documents"] = [structured(document) for document in documents]
    column = template.companions.get("chat_template_kwargs")
    if column and (given := structured(fields.get(column))):
        if not isinstance(given, dict):
            raise BadRow(column, "is not an object", 'write it as {"enable_thinking": false}', given)
        if taken := [name for name in RESERVED if name in given]:
            raise BadRow(f"{column}.{taken[0]}", "is not for a row to say", "remove it", given[taken[0]])
        settings |= {name: value for name, value in given.items() if value is not None}
    column = template.companions.get("enable_thinking")
    if column and (thinking := fields.get(column)) not in (None, ""):
        switch = as_switch(thinking)
        if switch is None:
            raise BadRow(column, "is neither true nor false", "write true, false, or leave it out", thinking)
        settings["enable_thinking"] = switch
    return tools, settings


def as_switch(value: Any) -> bool | None:
    """True or false, also as a number or a text; None for anything else."""
    if isinstance(value, bool):
        return value
    text = str(int(value)) if value in (0.0, 1.0) else str(value)
    return _SWITCHES.get(text.strip().lower())
