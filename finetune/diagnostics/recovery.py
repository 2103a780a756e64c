"""The readable rest of a broken recipe, so that one run reports what else is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune.config.schema import Recipe
from finetune.diagnostics.fields import known_part
from finetune.diagnostics.findings import FieldPath, Finding

_STAND_INS: dict[str | int, Any] = {
    "model": {"path": "unknown"},
    "data": {"train": "unknown"},
    "output": {"dir": "unknown"},
    "train": "unknown",
    "path": "unknown",
    "dir": "unknown",
}
_ROUNDS = 4


@dataclass(frozen=True)
class Rest:
    """A recipe in which broken fields have their defaults or stand-ins.

    broken: the paths of those fields.
    """

    recipe: Recipe
    broken: frozenset[FieldPath]

    def still_true(self, finding: Finding) -> bool:
        """Whether a finding about the rest also holds for the recipe as it was written."""
        if not finding.with_paths:
            return not any(_touches(path, finding.path) for path in self.broken)
        sections = {path[:1] for path in (finding.path, *finding.with_paths)}
        return not any(path[:1] in sections for path in self.broken)


def salvage(tree: dict[str, Any], unread: Iterable[FieldPath] = ()) -> Rest | None:
    """What is left of `tree` without its broken fields; None when that is no recipe either.

    unread: fields already known to be broken.
    """
    tree = deepcopy(tree)
    broken = set(unread)
    for _ in range(_ROUNDS):
        try:
            return Rest(Recipe.model_validate(tree), frozenset(broken))
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False, include_context=False):
                loc = detail["loc"]
                path = loc if detail["type"] == "extra_forbidden" else known_part(loc)
                broken.add(path)
                _repair(tree, path, missing=detail["type"] == "missing")
    return None


def _repair(tree: Any, path: FieldPath, missing: bool) -> None:
    """Remove the value at `path`, the whole list when it is an item; put a stand-in where something is missing."""
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
    if missing:
        tree[str(path[-1])] = deepcopy(_STAND_INS.get(path[-1]))
    else:
        tree.pop(path[-1], None)


def _touches(one: FieldPath, other: FieldPath) -> bool:
    """Whether one path leads through the other."""
    length = min(len(one), len(other))
    return one[:length] == other[:length]
