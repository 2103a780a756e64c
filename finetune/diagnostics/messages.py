"""pydantic's errors about a document in plain words: what is wrong, and what to write instead."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.diagnostics.advice import advice, name_advice, sentence
from finetune.diagnostics.fields import Kind
from finetune.diagnostics.findings import NOTHING, FieldPath, Finding, dotted
from finetune.diagnostics.schema import Schema


def findings_of(error: ValidationError, tree: Any, schema: Schema[Any], at: FieldPath = ()) -> list[Finding]:
    """One Finding per field that pydantic refused.

    tree: what was validated: a whole document, or what belongs `at` a path of one.
    """
    findings: dict[FieldPath, Finding] = {}
    details: list[dict[str, Any]] = [
        {**detail, "loc": (*at, *detail["loc"])} for detail in error.errors(include_url=False)
    ]
    for detail in details:
        unknown = detail["type"] == "extra_forbidden"
        path = detail["loc"] if unknown else schema.known_part(detail["loc"])
        if path in findings:  # another member of the same union
            continue
        if detail["type"] == "too_short" and any(
            len(other["loc"]) > len(path) == _shared(other["loc"], path) for other in details
        ):
            continue  # pydantic counts the items that are right
        value = value_at(tree, path[len(at) :])
        if unknown:
            findings[path] = _unknown_key(path, schema)
        elif detail["type"] == "missing":
            findings[path] = Finding(path, "is required and missing", _how_to_add(path, schema))
        elif detail["type"] == "refused":
            findings[path] = Finding(path, detail["ctx"]["what"], detail["ctx"]["hint"], _scalar(value))
        else:
            findings[path] = _wrong_value(path, detail, value, schema)
    return list(findings.values())


def _unknown_key(path: FieldPath, schema: Schema[Any]) -> Finding:
    name, parent = str(path[-1]), schema.kind_at(path[:-1])
    section = parent.section if parent else None
    assert section is not None, "pydantic forbids extra keys in sections only"
    where = dotted(path[:-1]) or schema.noun
    known = ", ".join(section.model_fields)
    return Finding(path, "is unknown", sentence(name_advice(name, section, schema), f"{where} has {known}"))


def _how_to_add(path: FieldPath, schema: Schema[Any]) -> str:
    kind = schema.kind_at(path)
    assert kind is not None
    if kind.section is None:
        return f"add it: {_explain(path, schema)}"
    needed = ", ".join(name for name, field in kind.section.model_fields.items() if field.is_required())
    return f"add a section {dotted(path)} with {needed} in it ({_purpose(kind.section)})"


def _wrong_value(path: FieldPath, detail: Any, value: Any, schema: Schema[Any]) -> Finding:
    kind = schema.kind_at(path)
    assert kind is not None
    what = _what(detail, kind)
    hint = sentence(advice(value, kind, schema.other_values), _explain(path, schema))
    return Finding(path, f"is null, {what}", hint) if value is None else Finding(path, what, hint, value)


def _what(detail: Any, kind: Kind) -> str:
    """What is wrong with a value, without the value."""
    bound = detail.get("ctx", {})
    limits = {
        "greater_than": f"must be above {bound.get('gt')}",
        "greater_than_equal": f"must be at least {bound.get('ge')}",
        "less_than": f"must be below {bound.get('lt')}",
        "less_than_equal": f"must be at most {bound.get('le')}",
        "finite_number": "must be a finite number",
        "string_unicode": "holds what is not a character (half a surrogate pair)",
        "string_too_short": "must not be empty",
        "too_short": "must not be empty",
    }
    if detail["type"] in limits:
        return limits[detail["type"]]
    if kind.choices:
        return "is none of the choices"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    wanted = [words[python_type] for python_type in words if kind.takes(python_type)]
    if kind.item is not None:
        wanted.append("a list")
    if kind.section is not None:
        wanted.append("a section")
    return f"must be {' or '.join(wanted)}"


def _explain(path: FieldPath, schema: Schema[Any]) -> str:
    """What the field at `path` takes and is for."""
    kind = schema.kind_at(path)
    assert kind is not None
    about = ""
    if kind.field is not None and kind.field.description and not (path and isinstance(path[-1], int)):
        about = f" ({kind.field.description})"
    elif kind.section is not None:
        about = f" ({_purpose(kind.section)})"
    return f"{dotted(path)} takes {kind.in_words()}{about}" if path else f"{schema.noun} is {kind.in_words()}"


def _purpose(section: type[BaseModel]) -> str:
    """First sentence of a section's docstring."""
    return (section.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _shared(one: FieldPath, other: FieldPath) -> int:
    """Length of what two paths begin with."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def value_at(tree: Any, path: FieldPath) -> Any:
    """The value at `path`; NOTHING where there is none."""
    for key in path:
        held = key in tree if isinstance(tree, dict) else isinstance(key, int) and key < _length(tree)
        if not held:
            return NOTHING
        tree = tree[key]
    return tree


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 0


def _scalar(value: Any) -> Any:
    """Values of whole sections say nothing in a message about them."""
    return NOTHING if isinstance(value, dict) else value
