"""A row as it is looked at: its tokens, which of them carry loss, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import DataSection
from finetune.data.bad_rows import BadRow
from finetune.data.encode import IGNORED, Encoder, Encoding
from finetune.data.feedback.rows import read_feedback
from finetune.data.feedback.tokens import FeedbackEncoder
from finetune.data.markers import Markers
from finetune.data.messages import interpret
from finetune.data.row_text import RowText, feedback_text, row_text
from finetune.data.rows import Row
from finetune.data.templates import DataTemplate, Feedbacks, FeedbackTemplate

LONGEST = 2**31 - 1
Reader = Callable[[Sequence[Row]], "list[Measured | BadRow]"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A row at its whole length.

    length: tokens that data.max_length is about.  ids, labels: all of them, with -100 where there is no loss.
    unread: columns that went nowhere.
    prompt: of a row with feedback: the tokens of its prompt.
    """

    length: int
    ids: list[int]
    labels: list[int]
    loss_tokens: int
    unread: tuple[str, ...]
    text: RowText
    prompt: list[int] | None = None


def reader_of(template: DataTemplate, section: DataSection, tokenizer: Any) -> Reader:
    """What measures rows of a template. DataError for a tokenizer that cannot encode them."""
    if isinstance(template, FeedbackTemplate):
        return _feedback_reader(template, section, tokenizer)
    encoder = Encoder(tokenizer, template, at_any_length(section))

    def read(rows: Sequence[Row]) -> list[Measured | BadRow]:
        found: list[Measured | BadRow] = []
        for row, answer in zip(rows, encoder.encode(rows), strict=True):
            if isinstance(answer, BadRow):
                found.append(answer)
                continue
            ids, text = answer.input_ids, row_text(interpret(row.fields, template))
            found.append(Measured(len(ids), ids, answer.labels, answer.loss_tokens, answer.unread, text))
        return found

    return read


def _feedback_reader(template: Feedbacks, section: DataSection, tokenizer: Any) -> Reader:
    encoder = FeedbackEncoder(tokenizer, template, at_any_length(section))

    def read(rows: Sequence[Row]) -> list[Measured | BadRow]:
        found: list[Measured | BadRow] = []
        for row, answer in zip(rows, encoder.encode(rows), strict=True):
            if isinstance(answer, BadRow):
                found.append(answer)
                continue
            ids, labels = list(answer.prompt_ids), [IGNORED] * len(answer.prompt_ids)
            for completion in answer.completions:
                ids += completion.ids
                labels += completion.labels
            text = feedback_text(read_feedback(row.fields, template))
            found.append(
                Measured(answer.longest, ids, labels, answer.loss_tokens, answer.unread, text, answer.prompt_ids)
            )
        return found

    return read


def at_any_length(section: DataSection) -> Encoding:
    """How the recipe's rows become labels, but for its limit."""
    markers = Markers(section.answers.begin, section.answers.end) if section.answers else None
    return Encoding(LONGEST, "error", section.loss_on, section.train_empty_think, markers)
