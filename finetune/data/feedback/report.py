"""What became of rows with feedback, and what in them teaches something else than what is meant."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.config.objectives import RowKind
from finetune.data.feedback.tokens import EncodedFeedback
from finetune.data.prepare_report import FileReport, PrepareReport

LOPSIDED = 0.6
"""Share of pairs whose chosen side is the longer one from which length may be what is learned."""
FEW_OF_A_LABEL = 0.1


@dataclass
class FeedbackFileReport(FileReport):
    """One file, before mixing.

    mixed: pairs of which one completion reasons and the other does not.
    plain: rows of plain text, outside a chat.
    """

    mixed: int = 0
    plain: int = 0

    def add_feedback(self, where: str, row: EncodedFeedback) -> None:
        """Count a row that was kept."""
        cut = any(completion.cut for completion in row.completions)
        self.kept += 1
        self.tokens += row.tokens
        self.loss_tokens += row.loss_tokens
        self.truncated += cut
        self.over_long += cut
        self.mixed += row.mixed
        self.plain += row.mode is None
        if row.longest > self.longest:
            self.longest, self.longest_at = row.longest, where
        for name in row.unread:
            self.unread[name] = self.unread.get(name, 0) + 1
        for completion in row.completions:
            self.reasoning_dropped += completion.reasoning_dropped
            self.reasons += completion.reasons
            if completion.end is not None:
                self.ends[completion.end] = self.ends.get(completion.end, 0) + 1
        if row.mode is not None:
            self.modes[row.mode] = self.modes.get(row.mode, 0) + 1


@dataclass(frozen=True)
class Findings:
    """Figures of the rows that are trained on.

    duplicates: rows that occur before.  contradictions: pairs that also occur the other way round, or answers with both
    labels.
    chosen_longer, rejected_longer: shares of the pairs.  chosen_tokens, rejected_tokens: means.
    good: share of the labels that are true.
    """

    duplicates: int = 0
    contradictions: int = 0
    chosen_longer: float | None = None
    rejected_longer: float | None = None
    chosen_tokens: float | None = None
    rejected_tokens: float | None = None
    good: float | None = None

    def notes(self) -> list[str]:
        """What a reader should know before training."""
        notes = []
        if self.duplicates:
            notes.append(f"{_rows(self.duplicates)} a copy of an earlier one: it counts twice")
        if self.contradictions:
            notes.append(f"{_rows(self.contradictions)} contradicted by another, which says the opposite: remove one")
        if self.chosen_longer is not None and self.rejected_longer is not None:
            notes += self._lengths(self.chosen_longer, self.rejected_longer)
        if self.good in (0.0, 1.0):
            only = "true" if self.good else "false"
            notes.append(f"every label is {only}: nothing tells good from bad; add rows of the other label")
        elif self.good is not None and not FEW_OF_A_LABEL <= self.good <= 1 - FEW_OF_A_LABEL:
            notes.append(f"{self.good:.0%} of the labels are true: weigh the few more, or add rows of their label")
        return notes

    def _lengths(self, chosen: float, rejected: float) -> list[str]:
        side = "chosen" if chosen >= rejected else "rejected"
        if max(chosen, rejected) < LOPSIDED:
            return []
        means = f"{self.chosen_tokens:.0f} tokens chosen, {self.rejected_tokens:.0f} rejected, on average"
        learned = "longer" if side == "chosen" else "shorter"
        return [
            f"the {side} answer is the longer one in {max(chosen, rejected):.0%} of the pairs ({means}): the model may"
            f" learn to answer {learned}"
        ]


def _rows(count: int) -> str:
    return "1 row is" if count == 1 else f"{count:,} rows are"


@dataclass(frozen=True)
class FeedbackReport(PrepareReport):
    """What preparing rows with feedback did.

    eval_prompts_trained: held-out rows whose prompt is trained on too.
    chat_model: whether the model has a chat template.
    """

    kind: RowKind = "preference"
    findings: Findings = field(default_factory=Findings)
    eval_prompts_trained: int = 0
    chat_model: bool = True

    def notes(self) -> list[str]:
        """What a reader should know before training."""
        notes = super().notes() + self.findings.notes()
        if mixed := sum(getattr(file, "mixed", 0) for file in self.files):
            pairs = "1 pair has" if mixed == 1 else f"{mixed:,} pairs have"
            notes.append(f"{pairs} one answer that reasons and one that does not: whether to think is learned as well")
        plain = sum(getattr(file, "plain", 0) for file in self.files)
        if plain and self.chat_model:
            rows = "1 row is" if plain == 1 else f"{plain:,} rows are"
            notes.append(
                f"{rows} plain text, outside the chat that the model is used in: write template: {self.kind}_chat if"
                " the texts are questions and answers"
            )
        if self.eval_prompts_trained:
            count = self.eval_prompts_trained
            notes.append(f"{count:,} held-out rows have a prompt that is trained on too: the evaluation flatters")
        return notes
