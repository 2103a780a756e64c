"""What the reader probably meant: names and values close to a mistaken one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.diagnostics.document import plain_value
from finetune.diagnostics.fields import Kind
from finetune.diagnostics.findings import dotted, printable
from finetune.diagnostics.schema import Schema

_SWITCHES = {"yes": True, "on": True, "y": True, "1": True, "no": False, "off": False, "n": False, "0": False}
_MULTIPLES = {"k": 1_000, "m": 1_000_000, "%": 0.01}


def did_you_mean(name: object, known: Iterable[object], within: Path | None = None) -> str | None:
    """`did you mean X?` with the one of `known` that `name` most likely meant, as a path when it lies `within` one."""
    by_lower = {str(item).lower(): str(item) for item in known}
    matches = get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    if not matches:
        return None
    meant = by_lower[matches[0]]
    return f"did you mean {meant if within is None else within / meant}?"


def sentence(*parts: str | None) -> str:
    """The parts that there are, in one line."""
    return "; ".join(filter(None, parts)).replace("?; ", "? ")


def name_advice(name: str, section: type[BaseModel], schema: Schema[Any]) -> str | None:
    """What to write instead of `name`, a key that `section` does not have."""
    if name in schema.other_names:
        return f"did you mean {schema.other_names[name]}?"
    homes = [dotted(field) for field, _ in schema.all_fields() if field[-1] == name]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    if "." in name and schema.kind_at(tuple(name.split("."))):
        first, _, rest = name.partition(".")
        return f"in a file, nest it: write {rest} below {first}"
    return did_you_mean(name, section.model_fields)


def advice(value: Any, kind: Kind) -> str | None:
    """What to write instead of `value`, where one can tell."""
    if kind.choices:
        return did_you_mean("none" if value is None else value, kind.choices)
    if isinstance(value, str):
        return _text_advice(value, kind)
    if value is None:
        return _null_advice(kind)
    if isinstance(value, float) and kind.takes(int) and value.is_integer() and abs(value) < 2**31:
        return f"write {int(value)}"
    if isinstance(value, bool | int | float) and kind.takes(str) and not kind.takes(int):
        return "put quotes around it to make it text"
    if isinstance(value, int) and not isinstance(value, bool) and kind.takes(bool):
        return f"write {str(bool(value)).lower()}"
    if isinstance(value, list) and len(value) == 1 and kind.item is None:
        return "write the value without [ ]"
    return None


def _text_advice(text: str, kind: Kind) -> str | None:
    plain = plain_value(text.strip())
    if kind.item is not None:
        names = ", ".join(part for part in text.replace(",", " ").split())
        return f"write a list: [{printable(names)}]"
    if kind.section is not None:
        needed = [name for name, field in kind.section.model_fields.items() if field.is_required()]
        return f"write {{{needed[0]}: {printable(text)}}}" if needed else None
    if kind.takes(bool):
        switch = plain if isinstance(plain, bool) else _SWITCHES.get(text.strip().lower())
        return None if switch is None else f"write {str(switch).lower()}"
    if text.strip().lower() in ("none", "null") and kind.takes(type(None)):
        return "write null without quotes"
    if not (kind.takes(int) or kind.takes(float)):
        return None
    if isinstance(plain, int | float) and not isinstance(plain, bool):
        return f"write it without quotes: {plain}"
    number, unit = plain_value(text.strip()[:-1].replace(",", "")), text.strip()[-1:].lower()
    if unit in _MULTIPLES and isinstance(number, int | float):
        number *= _MULTIPLES[unit]
        return f"write {number}" if isinstance(number, int) else f"write {number:g}"
    number = plain_value(text.replace(",", ""))
    return f"write {number}" if isinstance(number, int | float) and not isinstance(number, bool) else None


def _null_advice(kind: Kind) -> str | None:
    if kind.field is not None and kind.field.is_required():
        return None
    return "indent its fields below it, or remove the line" if kind.section else "remove the line to get the default"
