"""Mistakes as they are found at fields, and the lines or overrides those fields came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import Problem, shorten

FieldPath = tuple[str | int, ...]
"""Keys and list indices from the top of a document: ("data", "train", 0, "path")."""

NOTHING: Any = object()


@dataclass(frozen=True)
class Finding:
    """A mistake at a field.

    got: the offending value, left out when there is none to show.
    line: where it is, for mistakes that `path` does not lead to.
    with_paths: the other fields of a contradiction.
    """

    path: FieldPath
    what: str
    hint: str
    got: Any = NOTHING
    line: int | None = None
    with_paths: tuple[FieldPath, ...] = ()

    def problem(self, where: str | None = None) -> Problem:
        """As it is reported, at its field when no better place is known."""
        got = {} if self.got is NOTHING else {"got": self.got}
        return Problem(dotted(self.path) if where is None else where, self.what, self.hint, **got)


def dotted(path: FieldPath) -> str:
    """`data.train.0.path`, as an override spells it; keys that would garble a terminal are escaped."""
    return ".".join(printable(str(key)) for key in path)


def printable(text: str, limit: int = 60) -> str:
    """`text` in one short line without control characters."""
    return text if text.isprintable() and len(text) <= limit else shorten(text, limit)[1:-1]


class Places:
    """Where each field of a document was written: a line of its file, or an override."""

    def __init__(
        self,
        source: str,
        key_lines: Mapping[FieldPath, int] | None = None,
        value_lines: Mapping[FieldPath, int] | None = None,
    ) -> None:
        self._source = source
        self._key_lines = dict(key_lines or {})
        self._value_lines = dict(value_lines or {})
        self._overrides: dict[FieldPath, tuple[int, str]] = {}

    def override(self, path: FieldPath, text: str) -> None:
        """Everything at `path` and below now comes from the override `text`."""
        for places in (self._key_lines, self._value_lines, self._overrides):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]
        self._overrides[path] = (len(self._overrides), text)

    def wrap(self, path: FieldPath) -> None:
        """What was at `path` is now the one item of a list there."""
        for lines in (self._key_lines, self._value_lines):
            below = {
                known: line for known, line in lines.items() if len(known) > len(path) and known[: len(path)] == path
            }
            for known, line in below.items():
                del lines[known]
                lines[(*path, 0, *known[len(path) :])] = line

    def problems(self, findings: Iterable[Finding]) -> list[Problem]:
        """One Problem per finding, in the order of the file, overrides last."""
        placed = [(*self._place(finding), finding) for finding in findings]
        placed.sort(key=lambda entry: entry[0])
        return [finding.problem(where) for _, where, finding in placed]

    def _place(self, finding: Finding) -> tuple[tuple[int, int], str]:
        """Sort key, and `file:line: field` or `override key=value`."""
        field = dotted(finding.path)
        colon_field = f": {field}" if field else ""
        if finding.line is not None:
            return (0, finding.line), f"{self._source}:{finding.line}{colon_field}"
        for length in range(len(finding.path), 0, -1):
            path = finding.path[:length]
            if path in self._overrides:
                order, text = self._overrides[path]
                return (1, order), f"override {printable(text)}" + ("" if path == finding.path else colon_field)
            line = self._line(path, whole=path == finding.path and finding.got is NOTHING)
            if line is not None:
                return (0, line), f"{self._source}:{line}{colon_field}"
            below = [place for known, place in self._overrides.items() if known[:length] == path == finding.path]
            if below:
                return (1, below[0][0]), f"override {printable(below[0][1])}{colon_field}"
        return (0, 0), f"{self._source}{colon_field}"

    def _line(self, path: FieldPath, whole: bool) -> int | None:
        """Line of the value at `path` when it fits on one, else of its key; of the key when `whole`."""
        if not whole and path in self._value_lines:
            return self._value_lines[path]
        return self._key_lines.get(path)
