"""What a look at the quality of a set found, as plain facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXAMPLES = 5


@dataclass(frozen=True)
class Example:
    """A row that a finding is about. like: the row that it repeats.  alike: share of its runs of words in common."""

    row: str
    like: str | None = None
    alike: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without what there is not."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Finding:
    """Something about rows of one file that may be a mistake.

    kind: its name for programs.  what: what it is, in words.  remedy: what to do.  stops: whether `finetune train`
    stops at it.  rows: how many.  examples: the first of them.
    """

    kind: str
    file: str
    what: str
    remedy: str
    stops: bool = False
    rows: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, example: Example) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "examples": [example.to_dict() for example in self.examples]}


@dataclass(frozen=True)
class Lengths:
    """How many tokens rows have. counts: rows from one of `edges` tokens up to the next one."""

    p50: int
    p95: int
    max: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(lengths: NDArray[np.int64]) -> Lengths:
        """Two bins for each doubling."""
        if not len(lengths):
            return Lengths(0, 0, 0, (0, 1), (0,))
        p50, p95 = (int(np.percentile(lengths, share, method="higher")) for share in (50, 95))
        steps = [round(2**exponent * step) for exponent in range(31) for step in (1, 1.5)]
        first = max(index for index, edge in enumerate(steps) if edge <= max(lengths.min(), 1))
        last = min(index for index, edge in enumerate(steps) if edge > lengths.max())
        edges = sorted(set(steps[first : last + 1]))
        counts, _ = np.histogram(lengths, bins=edges)
        return Lengths(p50, p95, int(lengths.max()), tuple(edges), tuple(int(count) for count in counts))


@dataclass(frozen=True)
class FileQuality:
    """One file.

    use: `train` or `eval`.  read: rows found.  rows: those that can be trained, at any length.
    loss_tokens: tokens that carry loss.  longest_at: where the longest row is.
    over_limit: rows with more tokens than data.max_length.
    scripts: share of all letters that each Unicode script has.  script_rows: script -> rows with most letters in it.
    remarks: what the reader of the file found worth saying.
    """

    path: str
    template: str
    use: str
    read: int
    rows: int
    tokens: int
    loss_tokens: int
    lengths: Lengths
    longest_at: str
    over_limit: int
    scripts: dict[str, float]
    script_rows: dict[str, int]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class QualityReport:
    """All files, what was found in them, and what was not looked for.

    lengths, scripts: of the training rows together.
    held_out: where held-out rows come from: `data.eval`, `data.eval_fraction` or nowhere.
    held_out_rows: how many there are.
    not_looked_for: what could not be told, each with its reason.
    """

    files: Sequence[FileQuality]
    findings: Sequence[Finding]
    lengths: Lengths
    scripts: dict[str, float]
    max_length: int
    held_out: str | None
    held_out_rows: int
    not_looked_for: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        train = [file for file in self.files if file.use == "train"]
        return {
            "rows": sum(file.rows for file in train),
            "tokens": sum(file.tokens for file in train),
            "loss_tokens": sum(file.loss_tokens for file in train),
            "max_length": self.max_length,
            "lengths": vars(self.lengths),
            "scripts": self.scripts,
            "held_out": self.held_out,
            "held_out_rows": self.held_out_rows,
            "files": [{**vars(file), "lengths": vars(file.lengths)} for file in self.files],
            "findings": [finding.to_dict() for finding in self.findings],
            "not_looked_for": list(self.not_looked_for),
        }
