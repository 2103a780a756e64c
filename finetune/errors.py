"""What can go wrong, each with the place and the remedy.

Every error carries one or more `Problem`s and prints as

    error: <where>: <what>, got <value>
    hint: <what to do>

Messages name options as the command line does, `--resume`; raised in Python they name arguments, `resume=True`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

_MISSING: Any = ...
"""It is one object in every process."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    where: file and line, recipe field, tensor name or step.
    what: what is wrong, in one sentence without a full stop.
    hint: what the reader can do about it.
    got: the offending value, left out when there is none to show.
    """

    where: str
    what: str
    hint: str
    got: Any = _MISSING

    def __str__(self) -> str:
        got = "" if self.got is _MISSING else f", got {shorten(self.got)}"
        return f"error: {self.where}: {self.what}{got}\nhint: {self.hint}"


_PROSE = "and|or|with|out|first|to|in|that|is|starts|continues|has"
_OPTION = re.compile(
    r"(?P<command>`[^`]*`|\bfinetune [a-z-]+ [^,;`]*)"
    rf"|--(?P<name>[a-z][a-z-]*)(?: (?!(?:{_PROSE})\b)(?P<value>[\w./-]+))?"
)
_SWITCHES = ("resume", "overwrite", "generate")


def in_python(text: str) -> str:
    """`text` with `--dtype bf16` as `dtype="bf16"` and `--resume` as `resume=True`; whole commands stay commands."""

    def argument(found: re.Match[str]) -> str:
        if found["command"] is not None:
            return found["command"]
        name, value = found["name"].replace("-", "_"), found["value"]
        if name in _SWITCHES:
            return f"{name}=True" + (f" {value}" if value else "")
        return name if value is None else f'{name}="{value}"'

    return _OPTION.sub(argument, text)


def shorten(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut in the middle to at most `limit` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def first_of(
    problems: Sequence[Problem],
    limit: int,
    where: str,
    *,
    total: int | None = None,
    kind: str = "like these",
    hint: str | None = None,
) -> list[Problem]:
    """The first `limit` problems, and one at `where` that counts the rest.

    total: how many there are, when `problems` are only some of them.  kind, hint: of the rest; as the last one shown.
    """
    shown = list(problems[:limit])
    more = (len(problems) if total is None else total) - len(shown)
    return [*shown, Problem(where, f"and {more:,} more {kind}", hint or shown[-1].hint)] if more else shown


class FinetuneError(Exception):
    """Root of the tree. `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error needs at least one Problem"
        self.problems = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        return in_python(self.on_command_line())

    def on_command_line(self) -> str:
        """Every problem, with options as they are typed."""
        return "\n".join(str(problem) for problem in self.problems)


class UserError(FinetuneError, ValueError):
    """Something the user wrote or pointed at is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe or an override does not say something we can do."""


class DataError(UserError):
    """A data file, a row of it or a data template is wrong."""


class ModelError(UserError):
    """A model folder or checkpoint is missing, truncated or of no known family."""


class RoutingError(UserError):
    """A routing profile cannot be read, or does not hold what a plan is to be made of."""


class AdapterError(UserError):
    """An adapter, its targets or its files do not fit the model."""


class RunError(FinetuneError, RuntimeError):
    """Something failed while running. Exit code 1."""


class TrainingError(RunError):
    """Training cannot go on, or would go on wrongly."""


class StoppedError(RunError):
    """Training was asked to stop and can be continued. Exit code 143, the system's for SIGTERM."""

    exit_code = 143


class DiskError(RunError):
    """A disk does not take what is to be written."""


class ExportError(RunError):
    """What another program wrote for an export is not what was asked for."""


class VerifyError(RunError):
    """The merged weights do not reproduce base + adapter."""
