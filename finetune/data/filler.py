"""Nulls that a table put into objects whose keys differ from row to row, told from nulls that people wrote.

A column of objects has one set of keys for all rows; what a row lacks becomes null. Inside such a column the two
cannot be told apart, so its nulls go. JSON text has the nulls that were written. Lines of JSON can be either: they are
a table's where a null stands in the place of a JSON schema, where a call has a null for a parameter that its tool
does not have, or where objects that differ all have the same keys: calls of different tools, or messages of different
roles together with calls whose nulls their tool does not allow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from finetune.data.json_text import structured
from finetune.data.templates import ROLES

Clean = Callable[[Any], Any]
FOR_WHICH = 10_000
"""Rows with calls and nulls that are looked at for signs of a table."""


def without_filler(value: Any) -> Any:
    """`value` without the nulls of its objects."""
    if isinstance(value, dict):
        return {key: without_filler(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_filler(item) for item in value]
    return value


def arrow_cleaner(kind: Any) -> Clean | None:
    """What brings values of an Arrow type into the shape they had before; None where they have it."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda text: None if text is None else json.loads(text)
    if isinstance(kind, pa.BaseExtensionType):
        return arrow_cleaner(kind.storage_type)
    if pa.types.is_map(kind):
        item = arrow_cleaner(kind.item_type) or _same
        return lambda pairs: None if pairs is None else {key: item(value) for key, value in pairs}
    if pa.types.is_struct(kind):
        return _of_struct({kind.field(i).name: arrow_cleaner(kind.field(i).type) for i in range(kind.num_fields)})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _of_list(arrow_cleaner(kind.value_type))
    return None


def feature_cleaner(feature: Any) -> Clean | None:
    """The same for a feature of `datasets`, whose `Json` is decoded already."""
    if isinstance(feature, dict):
        return _of_struct({name: feature_cleaner(inner) for name, inner in feature.items()})
    if isinstance(feature, (list, tuple)):
        return _of_list(feature_cleaner(feature[0]) if feature else None)
    inner = getattr(feature, "feature", None)
    return _of_list(feature_cleaner(inner)) if inner is not None else None


def _of_struct(fields: dict[str, Clean | None]) -> Clean:
    cleaners = {name: clean or _same for name, clean in fields.items()}

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: cleaners.get(key, _same)(item) for key, item in value.items() if item is not None}

    return clean


def _of_list(item: Clean | None) -> Clean | None:
    if item is None:
        return None

    def clean(value: Any) -> Any:
        return [item(each) for each in value] if isinstance(value, list) else value

    return clean


def _same(value: Any) -> Any:
    return value


def sign_of_a_table(rows: Iterable[Any]) -> str | None:
    """Why the nulls in these rows are a table's filler; None where nothing says so.

    rows: those that may hold calls or schemas with nulls, as they were parsed.
    """
    signs = _Signs()
    for row in islice(rows, FOR_WHICH):
        if (sure := signs.add(row)) is not None:
            return sure
    return signs.taken_together()


class _Signs:
    """What rows have in common when a table wrote them."""

    def __init__(self) -> None:
        self._tools: set[str] = set()
        self._argument_keys: set[tuple[str, ...]] = set()
        self._message_keys: set[tuple[str, ...]] = set()
        self._nulls = self._nulls_not_allowed = self._nulls_beside = False

    def add(self, row: Any) -> str | None:
        """Look at a row; what in it only a table can have written."""
        objects = list(_objects(row))
        tools = {found["name"]: found["parameters"] for found in objects if _is_tool(found)}
        for name, schema in tools.items():
            if (place := _null_schema(schema)) is not None:
                return f"tool {name!r} has null where the schema of {place!r} should be"
        for found in objects:
            if isinstance(found.get("name"), str) and isinstance(found.get("arguments"), dict):
                if (sure := self._add_call(found["name"], found["arguments"], tools)) is not None:
                    return sure
            elif isinstance(role := found.get("role", found.get("from")), str):
                self._message_keys.add(tuple(found))
                self._nulls_beside |= ROLES.get(role) != "assistant" and None in found.values()
        return None

    def _add_call(self, name: str, arguments: dict[str, Any], tools: dict[str, Any]) -> str | None:
        empty = [key for key, value in arguments.items() if value is None]
        declared = (tools.get(name) or {}).get("properties")
        if isinstance(declared, dict) and (strange := [key for key in empty if key not in declared]):
            return f"a call of {name!r} has null for {strange[0]!r}, which is no parameter of it"
        self._tools.add(name)
        self._argument_keys.add(tuple(arguments))
        self._nulls |= bool(empty)
        self._nulls_not_allowed |= any(not isinstance(declared, dict) or not _may_be_null(declared[k]) for k in empty)
        return None

    def taken_together(self) -> str | None:
        """What no row shows alone: objects that differ have the same keys."""
        if not self._nulls or len(self._argument_keys) != 1:
            return None
        if len(self._tools) > 1:
            return f"calls of {len(self._tools)} tools all have the same keys"
        if self._nulls_not_allowed and self._nulls_beside and len(self._message_keys) == 1:
            return "all messages have the same keys, and so have all calls, with nulls that the tool does not allow"
        return None


def _is_tool(found: dict[str, Any]) -> bool:
    """Whether an object is a tool; JSON text is not looked into."""
    return isinstance(found.get("name"), str) and isinstance(found.get("parameters"), dict)


def _may_be_null(schema: Any) -> bool:
    """Whether a parameter's schema allows null."""
    if not isinstance(schema, dict) or ("default" in schema and schema["default"] is None) or schema.get("nullable"):
        return True
    kinds = schema.get("type")
    if kinds is None:
        choices = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
        return not choices or any(map(_may_be_null, choices))
    return kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or None in (schema.get("enum") or ())


def _objects(value: Any) -> Iterable[dict[str, Any]]:
    """Every object in a row."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _null_schema(schema: dict[str, Any]) -> str | None:
    """The first property whose schema is null."""
    for found in _objects(schema):
        properties = structured(found.get("properties"))
        if isinstance(properties, dict):
            for name, inner in properties.items():
                if inner is None:
                    return str(name)
    return None
