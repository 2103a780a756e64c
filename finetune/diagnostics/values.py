"""Types of single values that people write, and the errors by which a validator tells what is wrong and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os.path import expanduser
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, StringConstraints
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def refusal(what: str, hint: str) -> PydanticCustomError:
    """An error for validators to raise; it reaches the reader as it is."""
    return PydanticCustomError("refused", "{what}", {"what": what, "hint": hint})


def readable(text: str) -> str:
    """`text` when a person can read it: no control characters, no lone surrogates, not blank."""
    if _UNPRINTABLE.search(text):
        raise refusal("holds a control character", "write it with printable characters only")
    if not text.strip():
        raise refusal("is blank", "write a name")
    return text


def as_tuple(value: Any) -> Any:
    """A list as a tuple, which frozen sections hold; anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def as_switch(value: Any) -> Any:
    """True and false as `on` and `off`, which YAML 1.1 reads as those."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class OneOrMany:
    """Marks a list of sections that may be written as one section, and each section as the text of one of its fields.

    field: that field.  words: what may be written, before the list of its fields.
    """

    field: str
    words: str

    def spelled_out(self, value: Any) -> Any:
        """The list that a shorthand stands for, as a tuple; anything that is neither unchanged."""
        if isinstance(value, str | dict | BaseModel):
            value = (value,)
        if not isinstance(value, list | tuple):
            return value
        return tuple({self.field: item} if isinstance(item, str) else item for item in value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.spelled_out, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        several = handler(schema)
        one = {"anyOf": [{"type": "string", "minLength": 1}, several["items"]]}
        return {"anyOf": [*one["anyOf"], {**several, "items": one}]}


def no_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` when they differ from one another."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise refusal(f"names {', '.join(repeated)} more than once", "keep each name once")
    return names


Name = Annotated[str, StringConstraints(min_length=1), AfterValidator(readable)]
PathName = Annotated[Name, AfterValidator(expanduser)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
LARGEST = 1e6
"""Factors above this leave nothing finite in half precision."""
Scale = Annotated[float, Field(gt=0.0, le=LARGEST)]
Strength = Annotated[float, Field(ge=0.0, le=LARGEST)]
