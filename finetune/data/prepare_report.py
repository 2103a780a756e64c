"""What became of the rows: read, left out, tokens, loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.data.encode import Encoded


@dataclass
class FileReport:
    """One file, before mixing.

    use: `train` or `eval`.
    read: rows found, good and bad. kept: rows with tokens.
    skipped: reason -> rows left out for it, over-long ones among them.
    over_long: rows with more tokens than data.max_length, skipped or truncated.
    tokens, loss_tokens: of the kept rows, each counted once.
    longest, longest_at: tokens of the longest kept row, and where it is.
    reasoning_dropped: trained answers whose reasoning the model's chat template leaves out.
    reasons: trained answers that reason before they say something.
    drawn: rows of the training mix that come from here.
    unused: kept rows that the weights leave out.
    """

    path: str
    template: str
    use: str = "train"
    weight: float | None = None
    read: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    over_long: int = 0
    truncated: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    longest_at: str = ""
    reasoning_dropped: int = 0
    reasons: int = 0
    drawn: int = 0
    unused: int = 0

    def add(self, where: str, row: Encoded) -> None:
        """Count a row that was kept."""
        self.kept += 1
        self.tokens += len(row.input_ids)
        self.loss_tokens += row.loss_tokens
        self.truncated += row.truncated
        self.over_long += row.truncated
        self.reasoning_dropped += row.reasoning_dropped
        self.reasons += row.reasons
        if len(row.input_ids) > self.longest:
            self.longest, self.longest_at = len(row.input_ids), where


@dataclass(frozen=True)
class SplitReport:
    """The rows to train on, or those held out.

    blocks: blocks of data.max_length tokens after packing; `rows` without packing.
    fill_share: share of the blocks' tokens that rows fill; 1 without packing.
    """

    rows: int
    tokens: int
    loss_tokens: int
    blocks: int
    fill_share: float


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    eval_also_trained: held-out rows that also occur among the training rows, in files listed under both.
    """

    files: Sequence[FileReport]
    max_length: int
    packing: bool
    train: SplitReport
    eval: SplitReport | None = None
    eval_also_trained: int = 0

    @property
    def trains_reasoning(self) -> bool:
        """Whether a model trained on these rows reasons before it answers."""
        return any(file.reasons for file in self.files if file.use == "train")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"files": [asdict(file) for file in self.files]}

    def notes(self) -> list[str]:
        """What a reader should know before training."""
        skipped: Counter[str] = Counter()
        for file in self.files:
            skipped.update(file.skipped)
        notes = [f"{count:,} rows left out: {reason}" for reason, count in skipped.most_common()]
        for file in self.files:
            if file.unused:
                notes.append(f"{file.unused:,} of {file.kept:,} rows of {file.path} are left out by the weights")
        if truncated := sum(file.truncated for file in self.files):
            notes.append(f"{truncated:,} rows cut to data.max_length = {self.max_length:,} tokens")
        if dropped := sum(file.reasoning_dropped for file in self.files):
            notes.append(
                f"{dropped:,} answers are trained without their reasoning: the model's chat template shows it only"
                " after the last question of a chat (make each answer the last one of a row of its own to train it)"
            )
        if self.eval_also_trained:
            notes.append(f"{self.eval_also_trained:,} held-out rows are training rows too: the evaluation flatters")
        return notes

    def render(self) -> RenderableType:
        """A table of files and splits, with notes below."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("data", overflow="fold")
        for name in ("rows", "tokens", "with loss", "longest", "drawn"):
            table.add_column(name, justify="right")
        for file in self.files:
            weight = "" if file.weight in (None, 1) else f", weight {file.weight:g}"
            name = f"{file.path} ({file.template}{weight})"
            drawn = f"{file.drawn:,}" if file.use == "train" else "-"
            numbers = (file.kept, file.tokens, file.loss_tokens, file.longest)
            table.add_row(name, *(f"{number:,}" for number in numbers), drawn)
        lines = [Text(self._split("train", self.train))]
        if self.eval is not None:
            lines.append(Text(self._split("eval", self.eval)))
        lines += [Text(f"note: {note}", style="yellow") for note in self.notes()]
        return Group(table, *lines)

    def _split(self, name: str, split: SplitReport) -> str:
        text = f"{name}: {split.rows:,} rows, {split.tokens:,} tokens, {split.loss_tokens:,} with loss"
        if name == "train" and self.packing:
            blocks = "1 block" if split.blocks == 1 else f"{split.blocks:,} blocks"
            text += f", {blocks} of {self.max_length:,} tokens ({split.fill_share:.0%} full)"
        return text
