"""Lists and objects that a table, or a data set's `Json` column, keeps as text."""

from __future__ import annotations

import ast
import json
from typing import Any

from finetune.data.strict_json import check_text

NOTHING = ("", "null", "None")


def structured(value: Any) -> Any:
    """The list or object that a text writes in JSON, or as Python does where a table was made by it; others as is.

    Blank text and text that says null are None. Only for places that hold a list or an object: what people wrote stays
    text, whatever it looks like.
    BadRow when a text inside holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        return value
    if value.strip() in NOTHING:
        return None
    if value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (_from_json, _from_python):
        try:
            found = read(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if "\\u" in value:
            check_text({"": found})
        return found
    return value


def _from_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _from_python(text: str) -> Any:
    """Python's own notation, as `str(list)` has it; what JSON cannot say is refused."""
    return json.loads(json.dumps(ast.literal_eval(text.strip()), allow_nan=False))


def _refuse(name: str) -> Any:
    raise ValueError(name)
