"""Rows to token ids and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.bad_rows import BadRow
from finetune.data.control_tokens import ControlTokens, check_tokenizer
from finetune.data.conversation import Conversation, Passage
from finetune.data.fit import advice
from finetune.data.markers import CHATML, Markers
from finetune.data.mask import Answer, Tokens, find_answers, tokens_of
from finetune.data.messages import interpret
from finetune.data.prompts import Lead, Prompts
from finetune.data.rows import Row
from finetune.data.templates import DataTemplate, MessagesTemplate, TurnsTemplate
from finetune.data.tool_calls import argument_texts, with_parsed_arguments
from finetune.data.unread import unread_columns
from finetune.errors import DataError, Problem
from finetune.models.chat_text import ChatWriter
from finetune.models.text_tokens import TextTokenizer

Ids = NDArray[np.int32]

IGNORED = -100
MOST_ADVICE = 20
"""Rows of a file that are tried on other templates when they do not fit their own."""


@dataclass(frozen=True)
class Encoding:
    """How rows become labels; the fields are those of the recipe's `data` section."""

    max_length: int = 2**31 - 1
    over_long: Literal["error", "skip", "truncate", "split"] = "error"
    loss_on: Literal["assistant", "all_turns", "last", "all"] = "assistant"
    train_empty_think: bool = False
    answers: Markers | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row as tokens.

    ids: the tokenizer's ids of exactly the text that `apply_chat_template` renders.
    targets: the id where the token carries loss, -100 elsewhere; one per id. The first is always -100: nothing
        predicts it, and in a packed block the row before must not.
    loss_tokens: tokens that carry loss.
    reasoning_dropped: trained answers whose reasoning the chat template leaves out; Qwen3's keeps it only behind the
        last question.
    truncated: whether tokens were cut off at the end.
    reasons: trained answers that reason before they say something.
    lead: how a chat's last trained answer is asked for; None for text outside a chat.
    end: the token that training teaches as the end; None where it was cut off.
    unread: columns that went nowhere.
    rest: further rows that the text was split into.
    """

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    loss_tokens: int
    reasoning_dropped: int = 0
    truncated: bool = False
    reasons: int = 0
    lead: Lead | None = None
    end: int | None = None
    unread: tuple[str, ...] = ()
    rest: tuple[Encoded, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def input_ids(self) -> list[int]:
        """The ids as a list."""
        found: list[int] = self.ids.tolist()
        return found

    @property
    def labels(self) -> list[int]:
        """The targets as a list."""
        found: list[int] = self.targets.tolist()
        return found


class Encoder:
    """Encodes rows of one template for one tokenizer."""

    def __init__(self, tokenizer: Any, template: DataTemplate, encoding: Encoding) -> None:
        chats = isinstance(template, MessagesTemplate | TurnsTemplate)
        self._markers = check_tokenizer(tokenizer, chats=chats, answers=encoding.answers)
        self.tokenizer, self.template, self.encoding = tokenizer, template, encoding
        self._control = ControlTokens(tokenizer, self._markers)
        begin = (self._markers if isinstance(self._markers, Markers) else CHATML).begin
        self._apply = ChatWriter(tokenizer)
        self._texts = TextTokenizer(tokenizer)
        self._chat_template = str(tokenizer.chat_template)
        self._prompts = Prompts(self._apply, lambda text: self._texts([text])[0], begin)
        self._advised = 0

    def encode(self, rows: Sequence[Row]) -> list[Encoded | BadRow]:
        """One answer per row, in their order: its tokens, or what is wrong with it."""
        found = [self._guard(self._interpret, row) for row in rows]
        chats = [(i, item) for i, item in enumerate(found) if isinstance(item, tuple)]
        passages = [(i, item) for i, item in enumerate(found) if isinstance(item, Passage)]
        answers: dict[int, Encoded | BadRow] = {i: item for i, item in enumerate(found) if isinstance(item, BadRow)}
        for (i, (chat, text)), tokens in zip(chats, self._texts([text for _, (_, text) in chats]), strict=True):
            answers[i] = self._guard(self._finish_chat, chat, text, tokens)
        texts = [text for _, passage in passages for text in (passage.prompt, passage.completion)]
        tokens_by_text = self._texts(texts)
        for n, (i, _) in enumerate(passages):
            prompt, completion = (tokens.ids for tokens in tokens_by_text[2 * n : 2 * n + 2])
            answers[i] = self._guard(self._finish_passage, prompt, completion)
        return [self._with_unread(answers[i], rows[i], found[i]) for i in range(len(rows))]

    def _guard(self, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except BadRow as error:
            return error

    def _with_unread(self, answer: Encoded | BadRow, row: Row, found: Any) -> Encoded | BadRow:
        if isinstance(answer, BadRow):
            return answer
        made = found[0] if isinstance(found, tuple) else found
        unread = unread_columns(row.fields, made, self.template, self._chat_template)
        return replace(answer, unread=tuple(unread)) if unread else answer

    def _interpret(self, row: Row) -> tuple[Conversation, str] | Passage:
        try:
            found = interpret(row.fields, self.template)
        except BadRow as error:
            if self._advised < MOST_ADVICE:
                self._advised += 1
                error.hint = advice(row.fields, self.template, error) or error.hint
            raise
        if isinstance(found, Conversation):
            if isinstance(self._markers, Problem):
                raise DataError(self._markers)
            self._control.refuse_in_chat(found)
            return self.rendered(found)
        if self.template.control_tokens == "refuse":
            self._control.refuse_in_passage(found, self.template.needs)
        return found

    def rendered(self, chat: Conversation) -> tuple[Conversation, str]:
        """The chat as the tokenizer's own template takes it, and as it writes it."""
        error: Exception
        try:
            text = self._apply(chat.messages, chat.tools, chat.settings)
            if all(arguments in text for arguments in argument_texts(chat.messages)):
                return chat, text
            error = ValueError("arguments of a call are not shown")
        except DataError:
            raise
        except Exception as raised:  # templates fail with whatever Python raises
            error = raised
        try:
            chat = replace(chat, messages=with_parsed_arguments(chat.messages))
            return chat, self._apply(chat.messages, chat.tools, chat.settings)
        except DataError:
            raise
        except Exception:
            what = f"makes the model's chat template fail: {type(error).__name__}: {error}"
            hint = "bring the messages into the shape that the model card shows"
            raise BadRow("", what, hint, reason="makes the model's chat template fail") from None

    def _finish_chat(self, chat: Conversation, text: str, tokens: Tokens) -> Encoded:
        ids = tokens.ids
        assert isinstance(self._markers, Markers)
        answers = self._with_loss(find_answers(text, chat, self._markers))
        targets = ids.copy() if self.encoding.loss_on == "all" else np.full(len(ids), IGNORED, np.int32)
        end = None
        for answer in answers:
            begin, stop = tokens_of((answer.begin, answer.end), tokens)
            whole = self.encoding.train_empty_think or answer.said == answer.begin
            first = begin if whole else tokens.first_from(answer.said)
            targets[begin:stop] = IGNORED
            if answer.trained:
                targets[first:stop] = ids[first:stop]
                end = int(ids[stop - 1])
        trained = [answer for answer in answers if answer.trained]
        lead = self._prompts.lead(chat, text, tokens, answers)
        dropped = sum(answer.reasoning_dropped for answer in trained)
        return self._fitted(ids, targets, end, dropped, sum(answer.reasons for answer in trained), lead)

    def _with_loss(self, answers: list[Answer]) -> list[Answer]:
        """The answers, with loss where the recipe wants it; BadRow when that leaves none."""
        if self.encoding.loss_on == "last":
            answers = [replace(answer, trained=False) for answer in answers[:-1]] + answers[-1:]
            if not answers[-1].trained:
                hint = "give the last answer weight 1, or write data.loss_on: assistant"
                raise BadRow("", "carries no loss: its last answer has weight 0", hint)
        return answers

    def _finish_passage(self, prompt: Ids, completion: Ids) -> Encoded:
        ids = np.concatenate([prompt, completion, np.array([self.tokenizer.eos_token_id], np.int32)])
        targets = ids.copy()
        if self.encoding.loss_on != "all":
            targets[: len(prompt)] = IGNORED
        if self.encoding.over_long == "split" and not len(prompt):
            return self._split(ids)
        return self._fitted(ids, targets, int(ids[-1]))

    def _split(self, ids: Ids) -> Encoded:
        """Plain text as rows of at most `max_length` tokens, which go on where the one before stopped."""
        limit = self.encoding.max_length
        edges = [*range(0, len(ids), limit), len(ids)]
        if len(edges) > 2 and edges[-1] - edges[-2] == 1:  # the end of text, which only the token before it predicts
            edges[-2] -= 1
        rows = []
        for begin, end in pairwise(edges):
            targets = ids[begin:end].copy()
            targets[0] = IGNORED
            rows.append(Encoded(ids[begin:end], targets, end - begin - 1))
        rows[-1] = replace(rows[-1], end=int(ids[-1]))
        return replace(rows[0], rest=tuple(rows[1:]))

    def _fitted(
        self, ids: Ids, targets: Ids, end: int | None, dropped: int = 0, reasons: int = 0, lead: Lead | None = None
    ) -> Encoded:
        """A row within `max_length`, and with loss on it. BadRow when that cannot be."""
        limit, length = self.encoding.max_length, len(ids)
        targets[0] = IGNORED
        truncated = length > limit
        if truncated:
            if self.encoding.over_long != "truncate":
                hint = "raise data.max_length, or set data.over_long to skip or truncate, or for plain text to split"
                what = f"has {length:,} tokens, more than data.max_length = {limit:,}"
                fatal = self.encoding.over_long != "skip"
                raise OverLong("", what, hint, reason="has more tokens than data.max_length", fatal=fatal)
            ids, targets, end = ids[:limit], targets[:limit], None
        loss_tokens = int(np.count_nonzero(targets != IGNORED))
        if not loss_tokens and truncated:
            what = "has no token that carries loss within data.max_length"
            raise OverLong("", what, "raise data.max_length, or remove the row")
        if not loss_tokens:
            raise BadRow("", "has no token that carries loss", "remove the row")
        return Encoded(ids, targets, loss_tokens, dropped, truncated, reasons, lead, end)


class OverLong(BadRow):
    """A row has more tokens than `data.max_length`."""
