"""`key.sub=value` on top of the plain values of a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.diagnostics.document import NULL, read_document
from finetune.diagnostics.findings import FieldPath, Finding, Places, dotted, printable
from finetune.diagnostics.schema import Schema


def apply_overrides_(
    tree: dict[str, Any], overrides: Sequence[str], places: Places, schema: Schema[Any]
) -> list[Finding]:
    """Spell out `tree`, then set each override in it and tell `places`; returns what is wrong with them."""
    findings = []
    schema.spell_out_(tree, places)
    for text in overrides:
        path, value, problem = _read(text, schema)
        places.override(path, text)
        problem = problem or _set_(tree, path, value, schema)
        if problem is not None:
            findings.append(problem)
        schema.spell_out_(tree, places)
    return findings


def _read(text: str, schema: Schema[Any]) -> tuple[FieldPath, Any, Finding | None]:
    """Path and YAML-typed value of one override; the path leads nowhere when it cannot be read."""
    key, equals, value_text = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        hint = f"write section.field=value, such as {schema.example_override} (no spaces around =)"
        nowhere = (f"{printable(text)}=",)  # the place of no field, also where the text is the name of one
        return nowhere, None, Finding(nowhere, "is not an override", hint)
    path: FieldPath = tuple(
        int(name) if name.isdecimal() and name.isascii() and len(name) < 6 else name for name in names
    )
    document = read_document(value_text)
    if isinstance(document, Finding):
        return path, None, Finding(path, f"has a value that {document.what}", document.hint, value_text)
    if document.findings:
        first = document.findings[0]
        return path, None, Finding(path, f"has a value that {first.what}", first.hint, value_text)
    if document.value is None and (not value_text.strip() or not NULL.fullmatch(value_text.strip())):
        hint = f"write {dotted(path)}=VALUE; null is spelled out, and text that starts with # needs quotes"
        return path, None, Finding(path, "has no value", hint, value_text)
    return path, document.value, None


def _set_(tree: dict[str, Any], path: FieldPath, value: Any, schema: Schema[Any]) -> Finding | None:
    """Put `value` at `path`; sections on the way are made, lists and their items must exist."""
    here: Any = tree
    for depth, key in enumerate(path):
        above, last = dotted(path[:depth]), depth + 1 == len(path)
        if isinstance(here, dict):
            key = str(key)
            if not last and here.get(key) is None and _is_section(path[: depth + 1], schema):
                here[key] = {}
        elif not isinstance(here, list):
            what = f"goes below {above}, which is {'not given' if here is None else 'no section'}"
            return Finding(path, what, f"set it whole: {above}=VALUE")
        elif not isinstance(key, int) or key >= len(here):
            held = f"has items 0 to {len(here) - 1}" if here else "is empty"
            what = f"there is no item {printable(str(key))}"
            return Finding(path, what, f"{above} {held}; to add items, set it whole: {above}=[...]")
        if last:
            here[key] = value
        else:
            here = here.get(key) if isinstance(here, dict) else here[key]
    return None


def _is_section(path: FieldPath, schema: Schema[Any]) -> bool:
    """Whether the schema has a section or a dict at `path`, or does not know it at all."""
    kind = schema.kind_at(path)
    return kind is None or kind.section is not None or kind.entry is not None
