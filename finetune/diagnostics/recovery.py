"""Error recovery: a broken document without its broken fields, so that one run reports what else is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from finetune.diagnostics.findings import NOTHING, FieldPath, Finding
from finetune.diagnostics.schema import Schema

M = TypeVar("M", bound=BaseModel)
_ROUNDS = 4


@dataclass(frozen=True)
class Recovered(Generic[M]):
    """A document in which broken fields have their defaults or placeholders.

    broken: the paths of those fields.
    """

    value: M
    broken: frozenset[FieldPath]

    def still_true(self, finding: Finding) -> bool:
        """Whether a finding about what was recovered also holds for the document as it was written."""
        if not finding.with_paths:
            return not any(_touches(path, finding.path) for path in self.broken)
        sections = {path[:1] for path in (finding.path, *finding.with_paths)}
        return not any(path[:1] in sections for path in self.broken)


def recover(tree: dict[str, Any], schema: Schema[M], unread: Iterable[FieldPath] = ()) -> Recovered[M] | None:
    """What is left of `tree` without its broken fields; None when the model refuses that too.

    unread: fields already known to be broken.
    """
    tree = deepcopy(tree)
    broken = set(unread)
    for _ in range(_ROUNDS):
        try:
            return Recovered(schema.model.model_validate(tree), frozenset(broken))
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False, include_context=False):
                loc = detail["loc"]
                path = loc if detail["type"] == "extra_forbidden" else schema.known_part(loc)
                broken.add(path)
                kind = schema.kind_at(path) if detail["type"] == "missing" else None
                _repair_(tree, path, NOTHING if kind is None else kind.placeholder())
    return None


def _repair_(tree: Any, path: FieldPath, placeholder: Any) -> None:
    """Remove the value at `path`, the whole list when it is an item; put the placeholder there if there is one."""
    if not path:
        return
    while isinstance(path[-1], int):
        path = path[:-1]
    for key in path[:-1]:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return
    if not isinstance(tree, dict):
        return
    tree.pop(path[-1], None)
    if placeholder is not NOTHING:
        tree[str(path[-1])] = placeholder


def _touches(one: FieldPath, other: FieldPath) -> bool:
    """Whether one path leads through the other."""
    length = min(len(one), len(other))
    return one[:length] == other[:length]
