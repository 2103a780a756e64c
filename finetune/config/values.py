"""Types of single values in a recipe, and the shorthands a recipe may use."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from finetune.diagnostics.values import refusal

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
_AMOUNT = re.compile(r"[0-9]+|[0-9]+(\.[0-9]+)?[KMB]")


def amount(text: str) -> str:
    """`text` when it is a number with an optional K, M or B."""
    if not _AMOUNT.fullmatch(text):
        raise refusal("is no amount of parameters", "write a number such as 5000000, or 5M, 1.5B, 800K")
    return text


def parameters_in(value: str | int) -> int:
    """An amount as a number: `1.5M` is 1,500,000."""
    text = str(value)
    return int(Decimal(text[:-1]) * _UNITS[text[-1]]) if text[-1] in _UNITS else int(text)


def as_checkpointing(value: Any) -> Any:
    """True and false as `full` and `off`."""
    return {True: "full", False: "off"}[value] if isinstance(value, bool) else value


Amount = Annotated[str, AfterValidator(amount)]
DropoutRate = Annotated[float, Field(ge=0.0, lt=1.0)]
