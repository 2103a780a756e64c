"""Tools on offer and calls of them, checked to be what a chat template can write."""

from __future__ import annotations

import json
from typing import Any

from finetune.data.bad_rows import BadRow

CALL_HINT = 'a call is {"function": {"name": "...", "arguments": {...}}}'


def read_tools(value: Any, field: str) -> list[Any] | None:
    """A list of function schemas, also where a table keeps it as JSON text; None when there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(
                field, "is neither a list nor JSON of one", "write the tools as a list of objects", value
            ) from None
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRow(field, "is not a list", "write the tools as a list of objects", value)
    for index, tool in enumerate(value):
        schema = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
            hint = 'a tool is {"type": "function", "function": {"name": "...", "parameters": {...}}}'
            raise BadRow(f"{field}[{index}]", "is not a tool", hint, tool)
    return value


def read_tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls of one assistant turn; arguments stay as they are, an object or the JSON text of one."""
    if not isinstance(value, list):
        raise BadRow(field, "is not a list of calls", CALL_HINT, value)
    for index, call in enumerate(value):
        place = f"{field}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(place, "is not a call of a function", CALL_HINT, call)
        _check_arguments(function.get("arguments"), place)
    return value


def _check_arguments(arguments: Any, place: str) -> None:
    parsed = arguments
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, dict):
        hint = "arguments are an object, or the JSON text of one"
        raise BadRow(f"{place}.arguments", "is not an object", hint, arguments)


def with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every argument as an object, for chat templates that take no JSON text."""
    return [
        message | {"tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _parsed(call["function"])}
    arguments = call["arguments"]
    return call | {"arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
