"""Nulls that a table put into objects whose keys differ from row to row, told from nulls that people wrote.

A column of objects has one set of keys for all rows; what a row lacks becomes null. Inside such a column the two
cannot be told apart, so its nulls go. JSON text has the nulls that were written. Lines of JSON can be either: they are
a table's where a null stands in the place of a JSON schema, where a call has a null for a parameter that its tool
does not have, or where calls of different tools all have the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from finetune.data.json_text import structured

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
    keys_by_tool: dict[str, set[frozenset[str]]] = {}
    nulls = 0
    for count, row in enumerate(rows):
        if count == FOR_WHICH:
            break
        tools = {name: schema for name, schema in _tools(row) if isinstance(schema, dict)}
        for name, schema in tools.items():
            if (place := _null_schema(schema)) is not None:
                return f"tool {name!r} has null where the schema of {place!r} should be"
        for name, arguments in _calls(row):
            empty = {key for key, value in arguments.items() if value is None}
            nulls += bool(empty)
            declared = (tools.get(name) or {}).get("properties")
            if isinstance(declared, dict) and (strange := sorted(empty - declared.keys())):
                return f"a call of {name!r} has null for {strange[0]!r}, which is no parameter of it"
            keys_by_tool.setdefault(name, set()).add(frozenset(arguments))
    distinct = {keys for sets in keys_by_tool.values() for keys in sets}
    if nulls and len(keys_by_tool) > 1 and len(distinct) == 1:
        return f"calls of {len(keys_by_tool)} tools all have the same keys"
    return None


def _tools(row: Any) -> Iterable[tuple[str, Any]]:
    """Name and parameters of each tool anywhere in a row; JSON text is not looked into."""
    for found in _objects(row):
        if isinstance(found.get("name"), str) and "parameters" in found:
            yield found["name"], found["parameters"]


def _calls(row: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    for found in _objects(row):
        if isinstance(found.get("name"), str) and isinstance(found.get("arguments"), dict):
            yield found["name"], found["arguments"]


def _objects(value: Any) -> Iterable[dict[str, Any]]:
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
