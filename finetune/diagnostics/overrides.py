"""`key.sub=value` on top of a recipe's plain values."""

from __future__ import annotations

from typing import Any

from finetune.config.values import as_files
from finetune.diagnostics.document import NULL, read_document
from finetune.diagnostics.fields import kind_at
from finetune.diagnostics.findings import FieldPath, Finding, Places, dotted, printable

FILE_LISTS: tuple[FieldPath, ...] = (("data", "train"), ("data", "eval"))


def apply_overrides(tree: dict[str, Any], overrides: tuple[str, ...], places: Places) -> list[Finding]:
    """Set each override in `tree`, in place and in order, and tell `places`; returns what is wrong with them."""
    findings = []
    spell_out_files(tree, places)
    for text in overrides:
        path, value, problem = _read(text)
        places.override(path, text)
        problem = problem or _set(tree, path, value)
        if problem is not None:
            findings.append(problem)
        spell_out_files(tree, places)
    return findings


def spell_out_files(tree: dict[str, Any], places: Places) -> None:
    """Replace the shorthands of file lists in `tree` by lists of sections, so that paths lead to their fields."""
    section = tree.get("data")
    if not isinstance(section, dict):
        return
    for path in FILE_LISTS:
        files = section.get(path[1])
        if isinstance(files, dict):
            places.wrap(path)
        if isinstance(files, str | dict | list):
            section[path[1]] = list(as_files(files))


def _read(text: str) -> tuple[FieldPath, Any, Finding | None]:
    """Path and YAML-typed value of one override; the path has one odd part when it cannot be read."""
    key, equals, value_text = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        hint = "write section.field=value, such as train.steps=50 (no spaces around =)"
        return (printable(text),), None, Finding((printable(text),), "is not an override", hint)
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


def _set(tree: dict[str, Any], path: FieldPath, value: Any) -> Finding | None:
    """Put `value` at `path`; sections on the way are made, lists and their items must exist."""
    here: Any = tree
    for depth, key in enumerate(path):
        above, last = dotted(path[:depth]), depth + 1 == len(path)
        if isinstance(here, dict):
            key = str(key)
            if not last and here.get(key) is None and _is_section(path[: depth + 1]):
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


def _is_section(path: FieldPath) -> bool:
    """Whether the schema has a section at `path`, or does not know it at all."""
    kind = kind_at(path)
    return kind is None or kind.section is not None
