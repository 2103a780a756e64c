"""Tools on offer and calls of them, checked to be what a chat template can write."""

from __future__ import annotations

import json
from typing import Any

from finetune.data.bad_rows import BadRow
from finetune.data.json_text import structured

CALL_HINT = 'a call is {"function": {"name": "...", "arguments": {...}}}'
TOOL_HINT = 'a tool is {"type": "function", "function": {"name": "...", "parameters": {...}}}'


def read_tools(value: Any, field: str) -> list[Any] | None:
    """A list of function schemas; the list, a tool, or its function may be JSON text. None when there are none."""
    found = structured(value)
    if isinstance(found, str):
        if not found.strip():
            return None
        raise BadRow(field, "is neither a list nor JSON of one", "write the tools as a list of objects", value)
    if not found:
        return None
    if not isinstance(found, list):
        raise BadRow(field, "is not a list", "write the tools as a list of objects", value)
    return [_tool(tool, f"{field}[{index}]") for index, tool in enumerate(found)]


def _tool(value: Any, place: str) -> dict[str, Any]:
    tool = structured(value)
    inner = structured(tool.get("function", tool)) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRow(place, "is not a tool", TOOL_HINT, value)
    parameters = inner.get("parameters")
    if isinstance(parameters, str):
        parsed = structured(parameters) if parameters.strip() else {}
        if not isinstance(parsed, dict):
            raise BadRow(f"{place}.parameters", "is no JSON schema", TOOL_HINT, parameters)
        inner = inner | {"parameters": parsed}
    return tool | {"function": inner} if "function" in tool else inner


def read_tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls of one assistant turn; the list, a call, or its function may be JSON text.

    Arguments stay as they are, an object or the JSON text of one; blank and absent ones are an empty object.
    """
    found = structured(value)
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise BadRow(field, "is not a list of calls", CALL_HINT, value)
    return [_call(call, f"{field}[{index}]") for index, call in enumerate(found)]


def _call(value: Any, place: str) -> dict[str, Any]:
    call = structured(value)
    inner = structured(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRow(place, "is not a call of a function", CALL_HINT, value)
    inner = inner | {"arguments": _arguments(inner.get("arguments"), place)}
    return call | {"function": inner} if "function" in call else inner


def _arguments(value: Any, place: str) -> Any:
    parsed = value
    if isinstance(value, str):
        parsed = structured(value) if value.strip() else None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        hint = "arguments are an object, or the JSON text of one"
        raise BadRow(f"{place}.arguments", "is not an object", hint, value)
    return value if parsed and _is_json(value) else parsed


def _is_json(value: Any) -> bool:
    """Whether a text is JSON, and not Python's notation, which no chat template may repeat."""
    try:
        return not isinstance(value, str) or json.loads(value) is not None
    except (ValueError, RecursionError):
        return False


def with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every argument as an object, for chat templates that take no JSON text."""
    return [
        message | {"tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def argument_texts(messages: list[dict[str, Any]]) -> list[str]:
    """Every argument that is JSON text."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls") or ()]
    return [call["arguments"] for call in calls if isinstance(call["arguments"], str)]


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _parsed(call["function"])}
    arguments = call["arguments"]
    return call | {"arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
