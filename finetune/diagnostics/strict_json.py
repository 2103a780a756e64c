"""JSON that does not say two things of one key."""

from __future__ import annotations

from typing import Any


class DuplicateKeyError(ValueError):
    """JSON that says two things of one key; the argument is the key."""


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=no_duplicates)`."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise DuplicateKeyError(name)
        made[name] = value
    return made
