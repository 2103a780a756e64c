"""A row as it is looked at: its tokens, which of them carry loss, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from finetune.config.schema import DataSection
from finetune.data.bad_rows import BadRow
from finetune.data.encode import IGNORED, Encoded, Encoder, Encoding
from finetune.data.feedback.rows import read_feedback
from finetune.data.feedback.tokens import EncodedFeedback, FeedbackEncoder
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
    encoder: Encoder | FeedbackEncoder
    measure: Callable[[Row, Any], Measured]
    if isinstance(template, FeedbackTemplate):
        encoder = FeedbackEncoder(tokenizer, template, at_any_length(section))
        measure = partial(_feedback, template)
    else:
        encoder = Encoder(tokenizer, template, at_any_length(section))
        measure = partial(_supervised, template)

    def read(rows: Sequence[Row]) -> list[Measured | BadRow]:
        encoded = zip(rows, encoder.encode(rows), strict=True)
        return [answer if isinstance(answer, BadRow) else measure(row, answer) for row, answer in encoded]

    return read


def _supervised(template: DataTemplate, row: Row, encoded: Encoded) -> Measured:
    ids, text = encoded.input_ids, row_text(interpret(row.fields, template))
    return Measured(len(ids), ids, encoded.labels, encoded.loss_tokens, encoded.unread, text)


def _feedback(template: Feedbacks, row: Row, encoded: EncodedFeedback) -> Measured:
    ids, labels = list(encoded.prompt_ids), [IGNORED] * len(encoded.prompt_ids)
    for completion in encoded.completions:
        ids += completion.ids
        labels += completion.labels
    text = feedback_text(read_feedback(row.fields, template))
    return Measured(encoded.longest, ids, labels, encoded.loss_tokens, encoded.unread, text, encoded.prompt_ids)


def at_any_length(section: DataSection) -> Encoding:
    """How the recipe's rows become labels, but for its limit."""
    markers = Markers(section.answers.begin, section.answers.end) if section.answers else None
    return Encoding(LONGEST, "error", section.loss_on, section.train_empty_think, markers)
