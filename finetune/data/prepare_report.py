"""What became of the rows: read, left out, tokens, loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.data.bad_rows import NAMED
from finetune.data.encode import Encoded
from finetune.data.prompts import Lead
from finetune.data.unread import in_words


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
    pieces: how many more rows there are because long texts were split.
    drawn: rows of the training mix that come from here.
    unused: kept rows that the weights leave out.
    unread: column -> rows in which it has content that nothing reads.
    modes: mode of the model's prompt -> rows whose last trained answer it leads to: `on` and `off` for thinking, `only`
        where the chat template knows one prompt.
    unprompted: why no prompt leads to a row's answer -> rows. unprompted_at: the first of them.
    earlier: rows with loss on answers before the last that stand where the model would think, and show no thinking.
    ends: token that training teaches as the end -> rows.
    remarks: what the reader of the file found worth saying.
    parts: the files that rows came from; several where path is a folder or a pattern.
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
    pieces: int = 0
    drawn: int = 0
    unused: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    unprompted: dict[str, int] = field(default_factory=dict)
    unprompted_at: dict[str, list[str]] = field(default_factory=dict)
    earlier: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def add(self, where: str, row: Encoded) -> None:
        """Count a row that was kept."""
        self.kept += 1
        self.tokens += len(row)
        self.loss_tokens += row.loss_tokens
        self.truncated += row.truncated
        self.over_long += row.truncated
        self.reasoning_dropped += row.reasoning_dropped
        self.reasons += row.reasons
        if len(row) > self.longest:
            self.longest, self.longest_at = len(row), where
        for name in row.unread:
            _count(self.unread, name)
        if row.end is not None:
            _count(self.ends, row.end)
        if row.lead is not None:
            self._add_lead(where, row.lead)

    def _add_lead(self, where: str, lead: Lead) -> None:
        self.earlier += bool(lead.earlier)
        if lead.mode is not None:
            _count(self.modes, lead.mode)
            return
        _count(self.unprompted, lead.why)
        places = self.unprompted_at.setdefault(lead.why, [])
        if len(places) < NAMED:
            places.append(where)


def unprompted_note(why: str, count: int, places: Sequence[str]) -> str:
    """What to know about rows that no prompt of the model leads to."""
    more = f" and {count - NAMED:,} more" if count > NAMED else ""
    rows = "1 row is" if count == 1 else f"{count:,} rows are"
    return f"{rows} never asked for as trained, at {', '.join(places[:NAMED])}{more}: {why}"


def _count(counts: dict[Any, int], key: Any) -> None:
    counts[key] = counts.get(key, 0) + 1


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
    loss_on: the recipe's.
    """

    files: Sequence[FileReport]
    max_length: int
    packing: bool
    train: SplitReport
    eval: SplitReport | None = None
    eval_also_trained: int = 0
    loss_on: str = "assistant"

    @property
    def trains_reasoning(self) -> bool:
        """Whether a model trained on these rows reasons before it answers."""
        return any(file.reasons for file in self.files if file.use == "train")

    @property
    def thinking(self) -> bool | None:
        """The `enable_thinking` whose prompt leads to the trained answers; None where it makes no difference.

        True where any row is asked for with thinking: the model itself then decides, row by row.
        """
        modes = self._modes
        return bool(modes["on"]) if modes["on"] or modes["off"] else None

    @property
    def _modes(self) -> Counter[str]:
        modes: Counter[str] = Counter()
        for file in self.files:
            if file.use == "train":
                modes.update(file.modes)
        return modes

    @property
    def ends(self) -> list[int]:
        """Tokens that training teaches as the end of an answer, the most frequent first."""
        ends: Counter[int] = Counter()
        for file in self.files:
            if file.use == "train":
                ends.update(file.ends)
        return [token for token, _ in ends.most_common()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"files": [asdict(file) for file in self.files], "notes": self.notes()}

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
        if pieces := sum(file.pieces for file in self.files):
            notes.append(f"long texts were split at {self.max_length:,} tokens, which makes {pieces:,} more rows")
        notes += self._unread_note() + self._prompt_notes()
        notes += [remark for file in self.files for remark in file.remarks]
        if dropped := sum(file.reasoning_dropped for file in self.files):
            notes.append(
                f"{dropped:,} answers are trained without their reasoning: the model's chat template shows it only"
                " after the last question of a chat (make each answer the last one of a row of its own to train it)"
            )
        if self.eval_also_trained:
            notes.append(f"{self.eval_also_trained:,} held-out rows are training rows too: the evaluation flatters")
        return notes

    def _unread_note(self) -> list[str]:
        unread: Counter[str] = Counter()
        for file in self.files:
            unread.update(file.unread)
        return [f"not read: {in_words(unread)}"] if unread else []

    def _prompt_notes(self) -> list[str]:
        """Rows that the model's prompt does not lead to, and answers that stand where it would think."""
        notes = []
        for file in self.files:
            notes += [unprompted_note(why, count, file.unprompted_at[why]) for why, count in file.unprompted.items()]
        modes = self._modes
        if modes["on"] and modes["off"]:
            both = f"{modes['on']:,} with enable_thinking true, {modes['off']:,} with false"
            notes.append(f"rows are asked for in both ways: {both}")
        earlier = sum(file.earlier for file in self.files if file.use == "train")
        if earlier and self.loss_on == "assistant":
            rows = "1 row has" if earlier == 1 else f"{earlier:,} rows have"
            notes.append(
                f"{rows} loss on answers before the last one, which stand where the model would think and do not:"
                " write data.loss_on: last to train the last answer alone, or all_turns if it is meant"
            )
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
