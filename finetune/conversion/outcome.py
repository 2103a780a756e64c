"""What became of each setting of a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.config.foreign import Tool
from finetune.errors import Problem


class DroppedError(Exception):
    """A setting that a recipe has no place for; the argument is the reason."""


class RefusedError(Exception):
    """A setting without which this would be another run. Arguments: what is wrong, what to do."""


@dataclass(frozen=True)
class Mapped:
    """A setting, and the field with its value in the recipe."""

    key: str
    value: Any
    field: str
    ours: Any


@dataclass(frozen=True)
class Dropped:
    """A setting that is not in the recipe."""

    key: str
    value: Any
    reason: str


@dataclass
class Conversion:
    """A recipe made from a file of another tool.

    recipe: its YAML; None where something is refused.  unknown: keys that nobody here knows.  same: keys that ask for
    what happens anyway.
    refused: why this would be another run.  to_fix: what `finetune check` finds in the recipe here.
    """

    tool: Tool
    source: str
    mapped: list[Mapped] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    recipe: str | None = None
    to_fix: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Facts that `json.dumps` takes."""
        return {
            "tool": self.tool,
            "source": self.source,
            "mapped": [asdict(each) | {"value": plain(each.value)} for each in self.mapped],
            "dropped": [asdict(each) | {"value": plain(each.value)} for each in self.dropped],
            "unknown": self.unknown,
            "same": self.same,
            "notes": self.notes,
            "refused": [_problem(each) for each in self.refused],
            "to_fix": [_problem(each) for each in self.to_fix],
            "recipe": self.recipe,
        }


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _problem(problem: Problem) -> dict[str, str]:
    return {"where": problem.where, "what": problem.what, "hint": problem.hint}
