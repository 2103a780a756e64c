"""The pydantic model that every part of a document is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.diagnostics.messages import findings_of
from finetune.diagnostics.schema import Schema
from finetune.errors import UserError


class Section(BaseModel):
    """Frozen, no unknown keys, no NaN, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, checked like any other. Raises UserError with every problem."""
        if not update:
            return super().model_copy(deep=deep)
        fields = {name: getattr(self, name) for name in type(self).model_fields} | dict(update)
        try:
            made = type(self).model_validate(fields)
            made.model_fields_set.intersection_update(self.model_fields_set | update.keys())
            return made
        except ValidationError as refused:
            findings = findings_of(refused, fields, Schema(type(self), noun=type(self).__name__))
        raise UserError(*(finding.problem() for finding in findings))
