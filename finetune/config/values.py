"""Types of single values in a recipe, and the shorthands a recipe may use for lists."""

from __future__ import annotations

import re
from decimal import Decimal
from os.path import expanduser
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from pydantic_core import PydanticCustomError

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
_AMOUNT = re.compile(r"[0-9]+|[0-9]+(\.[0-9]+)?[KMB]")


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


def amount(text: str) -> str:
    """`text` when it is a number with an optional K, M or B."""
    if not _AMOUNT.fullmatch(text):
        raise refusal("is no amount of parameters", "write a number such as 5000000, or 5M, 1.5B, 800K")
    return text


def parameters_in(value: str | int) -> int:
    """An amount as a number: `1.5M` is 1,500,000."""
    text = str(value)
    return int(Decimal(text[:-1]) * _UNITS[text[-1]]) if text[-1] in _UNITS else int(text)


def as_tuple(value: Any) -> Any:
    """A list as a tuple, which frozen sections hold; anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def as_files(value: Any) -> Any:
    """The shorthands of `data.train` and `data.eval`, a name or a list of names, as a tuple of file sections."""
    if isinstance(value, str | dict | BaseModel):
        value = (value,)
    if not isinstance(value, list | tuple):
        return value
    return tuple({"path": file} if isinstance(file, str) else file for file in value)


def as_switch(value: Any) -> Any:
    """True and false as `on` and `off`, which YAML 1.1 reads as those."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def as_checkpointing(value: Any) -> Any:
    """True and false as `full` and `off`."""
    return "full" if as_switch(value) == "on" else as_switch(value)


def no_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` when they differ from one another."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise refusal(f"names {', '.join(repeated)} more than once", "keep each name once")
    return names


Name = Annotated[str, StringConstraints(min_length=1), AfterValidator(readable)]
PathName = Annotated[Name, AfterValidator(expanduser)]
Amount = Annotated[str, AfterValidator(amount)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, le=1.0)]
DropoutRate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
