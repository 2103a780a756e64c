"""What the reader probably meant: names and values close to a mistaken one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.diagnostics.document import plain_value
from finetune.diagnostics.fields import Kind
from finetune.diagnostics.findings import dotted, printable
from finetune.diagnostics.schema import Schema

NEAR = 0.7
"""Likeness, by `difflib`, from which on a name is taken for a misspelling of another."""
NEARER = 0.8
"""The same for a name in another section."""

_SWITCHES = {"yes": True, "on": True, "y": True, "1": True, "no": False, "off": False, "n": False, "0": False}
_MULTIPLES = {"k": 1_000, "m": 1_000_000, "%": 0.01}


def nearest(name: object, known: Iterable[object], near: float = NEAR) -> str | None:
    """The one of `known` that `name` is a misspelling or the beginning of; None when none is near."""
    wanted, by_lower = str(name).lower(), {str(item).lower(): str(item) for item in known}
    alike = get_close_matches(wanted, by_lower, n=1, cutoff=near)
    swapped = [word for word in by_lower if sorted(word) == sorted(wanted)]
    begun = [word for word in by_lower if len(wanted) > 2 and word.startswith((f"{wanted}.", f"{wanted}_"))]
    return next((by_lower[word] for word in (*alike, *swapped, *begun)), None)


def did_you_mean(name: object, known: Iterable[object], within: Path | None = None) -> str | None:
    """`did you mean X?` with the nearest of `known`, as a path when it lies `within` one; None when none is near."""
    meant = nearest(name, known)
    return None if meant is None else f"did you mean {meant if within is None else within / meant}?"


def sentence(*parts: str | None) -> str:
    """The parts that there are, in one line."""
    return "; ".join(filter(None, parts)).replace("?; ", "? ")


def name_advice(name: str, section: type[BaseModel], schema: Schema[Any]) -> str | None:
    """What to write instead of `name`, a key that `section` does not have."""
    word = name.lower().lstrip("-").replace("-", "_")
    if word in section.model_fields:
        return f"did you mean {word}?"
    if word in schema.other_names:
        return f"did you mean {schema.other_names[word]}?"
    homes: dict[str, list[str]] = {}
    for field, _ in schema.all_fields():
        homes.setdefault(str(field[-1]), []).append(dotted(field))
    if word in homes:
        return f"did you mean {' or '.join(homes[word])}?"
    if word in schema.absent:
        return schema.absent[word]
    if "." in name and schema.kind_at(tuple(name.split("."))):
        first, _, rest = name.partition(".")
        return f"in a file, nest it: write {rest} below {first}"
    meant = did_you_mean(name, section.model_fields)
    elsewhere = nearest(word, homes, NEARER) if meant is None else None
    return meant if elsewhere is None else f"did you mean {' or '.join(homes[elsewhere])}?"


def advice(value: Any, kind: Kind, other_values: Mapping[str, str]) -> str | None:
    """What to write instead of `value`, where one can tell.  other_values: see `Schema`."""
    if kind.choices:
        if (meant := other_values.get(str(value).lower())) in kind.choices:
            return f"did you mean {meant}?"
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
