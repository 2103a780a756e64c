"""JSON as its standard has it: no NaN, no key twice in one object, no half of a surrogate pair."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finetune.data.bad_rows import BadRow

Fields = dict[str, Any]

_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\n\r]*")


class StrictJson:
    """A JSON parser that knows where it met a NaN or a key twice."""

    def __init__(self) -> None:
        self._repeated: str | None = None
        self._nan: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> Fields:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            self._repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return fields

    def _constant(self, name: str) -> float:
        self._nan = name
        return float(name.replace("Infinity", "inf"))

    def value_at(self, text: str, position: int) -> tuple[Any, int]:
        """The value that starts at `position`, and where it ends. BadRow when it is no JSON."""
        self._repeated = self._nan = None
        try:
            return self._decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _bad_json(error, text) from None
        except RecursionError:
            raise BadRow("", "is nested too deeply", "keep rows flat") from None
        except ValueError:
            raise BadRow("", "holds a number too long to read", "write long digit sequences as text") from None

    def fields(self, text: str, *, one_line: bool = False) -> Fields:
        """The object that `text` is. BadRow when it is anything else."""
        begin = skip_space(text, 0)
        value, end = self.value_at(text, begin)
        end = skip_space(text, end)
        if end < len(text):
            hint = "write one object per line" if one_line else "write one list of objects per file"
            raise BadRow(
                "", f"has text after the object, at column {end + 1}", hint, text[end:], reason="is not valid JSON"
            )
        return self.checked(value, escapes="\\u" in text)

    def checked(self, value: Any, *, escapes: bool) -> Fields:
        """The value just read, when it is an object without faults; `escapes` when it may hold escaped characters."""
        if not isinstance(value, dict):
            kind = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(
                type(value), "a number"
            )
            hint = 'each row is one object, such as {"messages": [...]}; a file that is one list of rows is named .json'
            raise BadRow("", f"is {kind}, not an object", hint, value, reason="is not an object")
        if self._repeated is not None:
            raise BadRow(self._repeated, "occurs twice in one object", "keep one of the two", reason="has a key twice")
        if self._nan is not None:
            field = next((path for path, item in walk(value) if isinstance(item, float) and _odd(item)), "")
            raise BadRow(
                field, f"is {self._nan}, which is not JSON", "write null or leave the field out", reason="has a NaN"
            )
        if escapes:
            check_text(value)
        return value


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything below `value` that is no object and no list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, f"{path}[{index}]")
    else:
        yield path, value


def check_text(fields: Fields) -> None:
    """BadRow when a text holds half of a surrogate pair, which no tokenizer can encode."""
    for path, item in walk(fields):
        if isinstance(item, str) and not item.isascii() and (half := _SURROGATE.search(item)):
            hint = "the text was cut inside an emoji or wrongly converted; write it again as UTF-8"
            raise BadRow(path, "holds half of a surrogate pair", hint, half.group())


def skip_space(text: str, position: int) -> int:
    """The first position from `position` on that is no white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _odd(number: float) -> bool:
    return number != number or number in (float("inf"), float("-inf"))


def _bad_json(error: json.JSONDecodeError, text: str) -> BadRow:
    hint = "check quotes, commas and brackets; the line may be cut off"
    if error.pos < len(text) and ord(text[error.pos]) < 32 and "control character" in error.msg:
        hint = "write line breaks and tabs inside a text as \\n and \\t"
    elif text.startswith("'", error.pos):
        hint = "JSON texts stand in double quotes"
    around = text[max(error.pos - 30, 0) : error.pos + 30]
    line = f"line {error.lineno} " if error.lineno > 1 else ""
    what = f"is not valid JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}"
    return BadRow("", what, hint, around, reason="is not valid JSON")
