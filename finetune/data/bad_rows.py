"""Bad rows: what is wrong with one, and the collection that becomes one error or a count."""

from __future__ import annotations

from collections import Counter
from typing import Any

from finetune.errors import Problem, first_of

SHOWN = 20
SHOWN_PER_REASON = 5
SKIP_HINT = "mend the rows, or set data.on_bad_row: skip to leave bad rows out and count them"
_MISSING: Any = object()


class BadRow(Exception):  # noqa: N818
    """One row cannot be used.

    field: path inside the row, such as `messages[2].content`; empty when the row as a whole is bad.
    what, hint, got: as in `Problem`.
    reason: `what` without its details, which rows are counted by; `what` itself when left out.
    fatal: True for an error even where bad rows are skipped, False for a row that is skipped in any case.
    """

    def __init__(
        self, field: str, what: str, hint: str, got: Any = _MISSING, *, reason: str = "", fatal: bool | None = None
    ) -> None:
        super().__init__(field, what)
        self.field, self.what, self.hint, self.got = field, what, hint, got
        self.reason = reason or what
        self.fatal = fatal

    def problem(self, where: str) -> Problem:
        """The same as a `Problem` of the row at `where`."""
        place = f"{where}: {self.field}" if self.field else where
        if self.got is _MISSING:
            return Problem(place, self.what, self.hint)
        return Problem(place, self.what, self.hint, self.got)


class BadRows:
    """The bad rows of a file. Every one is counted by its reason; the first few of each reason are kept in full.

    skip: leave bad rows out, but for those that are errors in any case.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self.reasons: Counter[str] = Counter()
        self._skip = skip
        self._errors: set[str] = set()
        self._problems: list[tuple[str, Problem]] = []

    def add(self, where: str, row: BadRow) -> None:
        """Count the row at `where` (file and line)."""
        self.reasons[row.reason] += 1
        if row.fatal or (row.fatal is None and not self._skip):
            self._errors.add(row.reason)
        if self.reasons[row.reason] <= SHOWN_PER_REASON:
            self._problems.append((row.reason, row.problem(where)))

    def __len__(self) -> int:
        return self.reasons.total()

    @property
    def stop(self) -> bool:
        """Whether there are rows that are not to be skipped."""
        return bool(self._errors)

    def listing(self, source: str, *, skipped_too: bool = False) -> list[Problem]:
        """The rows that stop the run: at most `SHOWN` problems, and one that counts the rest."""
        reasons = set(self.reasons) if skipped_too else self._errors
        shown = [problem for reason, problem in self._problems if reason in reasons]
        counted = [f"{count:,} x {reason}" for reason, count in self.reasons.most_common() if reason in reasons]
        total, kind = sum(self.reasons[reason] for reason in reasons), f"bad rows (in all: {', '.join(counted[:5])})"
        return first_of(shown, SHOWN, source, total=total, kind=kind, hint=SKIP_HINT)
