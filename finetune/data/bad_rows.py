"""Bad rows: what is wrong with one, and the collection that becomes one error or a count."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from finetune.errors import Problem

SHOWN = 20
SHOWN_PER_REASON = 5
NAMED = 4
SKIP_HINT = "mend the rows, or set data.on_bad_row: skip to leave bad rows out and count them"
ALL_BAD_HINT = "every row is bad, so the file or its template is not what the recipe takes it for"
_MISSING: Any = ...


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

    def __reduce__(self) -> Any:
        got = () if self.got is _MISSING else (self.got,)
        make = partial(type(self), reason=self.reason, fatal=self.fatal)
        return make, (self.field, self.what, self.hint, *got)

    def problem(self, where: str) -> Problem:
        """The same as a `Problem` of the row at `where`."""
        place = f"{where}: {self.field}" if self.field else where
        if self.got is _MISSING:
            return Problem(place, self.what, self.hint)
        return Problem(place, self.what, self.hint, self.got)


class BadRows:
    """The bad rows of a file. Every one is counted by its reason; the first few kinds of each reason are kept in full.

    skip: leave bad rows out, but for those that are errors in any case.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self.reasons: Counter[str] = Counter()
        self._skip = skip
        self._errors: set[str] = set()
        self._alike: dict[tuple[str, ...], _Alike] = {}
        self._kinds: Counter[str] = Counter()

    def add(self, where: str, row: BadRow) -> None:
        """Count the row at `where` (file and line)."""
        self.reasons[row.reason] += 1
        if row.fatal or (row.fatal is None and not self._skip):
            self._errors.add(row.reason)
        key = (row.reason, _INDEX.sub("[]", row.field), _INDEX.sub("[]", row.what))
        if (alike := self._alike.get(key)) is not None:
            alike.add(where)
        elif self._kinds[row.reason] < SHOWN_PER_REASON:
            self._kinds[row.reason] += 1
            self._alike[key] = _Alike(row.problem(where), where)

    def __len__(self) -> int:
        return self.reasons.total()

    @property
    def stop(self) -> bool:
        """Whether there are rows that are not to be skipped."""
        return bool(self._errors)

    def listing(self, source: str, *, good: int = 1, skipped_too: bool = False) -> list[Problem]:
        """The rows that stop the run, alike ones as one: at most `SHOWN` problems, and one that counts the rest.

        good: how many rows of the file are good; leaving bad rows out is no advice where none is.
        """
        reasons = set(self.reasons) if skipped_too else self._errors
        kept = [alike for (reason, *_), alike in self._alike.items() if reason in reasons][:SHOWN]
        shown = [alike.problem() for alike in kept]
        total = sum(self.reasons[reason] for reason in reasons)
        if total == len(shown):
            return shown
        counted = [f"{count:,} x {reason}" for reason, count in self.reasons.most_common() if reason in reasons]
        what = f"{total:,} bad rows in all ({', '.join(counted[:5])})"
        return [*shown, Problem(source, what, SKIP_HINT if good else ALL_BAD_HINT)]


_INDEX = re.compile(r"\[\d+\]")


class _Alike:
    """Rows that are bad in the same place for the same reason."""

    def __init__(self, first: Problem, where: str) -> None:
        self._first, self._source = first, where
        self._more = 0
        self._next: list[str] = []

    def add(self, where: str) -> None:
        self._more += 1
        if len(self._next) < NAMED:
            same_file = where.rpartition(":")[0] == self._source.rpartition(":")[0]
            self._next.append(where.rpartition(":")[2].strip() if same_file else where)

    def problem(self) -> Problem:
        """The first of them, with where the others are."""
        if not self._more:
            return self._first
        named = ", ".join(self._next)
        rest = self._more - len(self._next)
        also = f"{named} and {rest:,} more" if rest else named
        return replace(self._first, what=f"{self._first.what} (so in {also})")
