"""Rows to token ids and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune.data.bad_rows import BadRow
from finetune.data.control_tokens import ControlTokens, check_tokenizer
from finetune.data.conversation import Conversation, Passage
from finetune.data.markers import Markers
from finetune.data.mask import find_answers, tokens_of
from finetune.data.messages import interpret
from finetune.data.rows import Row
from finetune.data.templates import DataTemplate, MessagesTemplate, TurnsTemplate
from finetune.data.tool_calls import with_parsed_arguments
from finetune.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Encoding:
    """How rows become labels; the fields are those of the recipe's `data` section."""

    max_length: int = 2**31 - 1
    over_long: Literal["error", "skip", "truncate"] = "error"
    loss_on: Literal["assistant", "all"] = "assistant"
    train_empty_think: bool = False
    answers: Markers | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens.

    input_ids: the tokenizer's ids of exactly the text that `apply_chat_template` renders.
    labels: the id where the token carries loss, -100 elsewhere; one per id. The first is always -100: nothing
        predicts it, and in a packed block the row before must not.
    reasoning_dropped: trained answers whose reasoning the chat template leaves out; Qwen3's keeps it only behind the
        last question.
    truncated: whether tokens were cut off at the end.
    reasons: trained answers that reason before they say something.
    """

    input_ids: list[int]
    labels: list[int]
    reasoning_dropped: int = 0
    truncated: bool = False
    reasons: int = 0

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORED)


class Encoder:
    """Encodes rows of one template for one tokenizer."""

    def __init__(self, tokenizer: Any, template: DataTemplate, encoding: Encoding) -> None:
        chats = isinstance(template, MessagesTemplate | TurnsTemplate)
        self._markers = check_tokenizer(tokenizer, chats=chats, answers=encoding.answers)
        self.tokenizer, self.template, self.encoding = tokenizer, template, encoding
        self._control = ControlTokens(tokenizer, self._markers)

    def encode(self, rows: Sequence[Row]) -> list[Encoded | BadRow]:
        """One answer per row, in their order: its tokens, or what is wrong with it."""
        found = [self._guard(self._interpret, row) for row in rows]
        chats = [(i, item) for i, item in enumerate(found) if isinstance(item, tuple)]
        passages = [(i, item) for i, item in enumerate(found) if isinstance(item, Passage)]
        answers: dict[int, Encoded | BadRow] = {i: item for i, item in enumerate(found) if isinstance(item, BadRow)}
        for (i, (chat, text)), tokens in zip(chats, self._tokenize([text for _, (_, text) in chats]), strict=True):
            answers[i] = self._guard(self._finish_chat, chat, text, tokens)
        texts = [text for _, passage in passages for text in (passage.prompt, passage.completion)]
        tokens_by_text = self._tokenize(texts)
        for n, (i, _) in enumerate(passages):
            prompt, completion = (list(tokens.ids) for tokens in tokens_by_text[2 * n : 2 * n + 2])
            answers[i] = self._guard(self._finish_passage, prompt, completion)
        return [answers[i] for i in range(len(rows))]

    def _guard(self, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except BadRow as error:
            return error

    def _tokenize(self, texts: list[str]) -> Any:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).encodings

    def _interpret(self, row: Row) -> tuple[Conversation, str] | Passage:
        found = interpret(row.fields, self.template)
        if isinstance(found, Conversation):
            self._control.refuse_in_chat(found)
            return found, self.render(found)
        if self.template.control_tokens == "refuse":
            self._control.refuse_in_passage(found, self.template.needs)
        return found

    def render(self, chat: Conversation) -> str:
        """The chat as the tokenizer's own template writes it."""
        try:
            return self._apply(chat.messages, chat.tools)
        except Exception as error:  # templates fail with whatever Python raises
            try:
                return self._apply(with_parsed_arguments(chat.messages), chat.tools)
            except Exception:
                what = f"makes the model's chat template fail: {type(error).__name__}: {error}"
                hint = "bring the messages into the shape that the model card shows"
                raise BadRow("", what, hint, reason="makes the model's chat template fail") from None

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)

    def _finish_chat(self, chat: Conversation, text: str, tokens: Any) -> Encoded:
        ids = list(tokens.ids)
        assert self._markers is not None
        answers = find_answers(text, chat, self._markers)
        train_all = self.encoding.loss_on == "all"
        labels = list(ids) if train_all else [IGNORED] * len(ids)
        for answer in answers:
            begin, end = tokens_of((answer.begin, answer.end), tokens)
            first = begin if self.encoding.train_empty_think else tokens_of((answer.said, answer.end), tokens)[0]
            labels[begin:end] = [IGNORED] * (end - begin)
            if answer.trained:
                labels[first:end] = ids[first:end]
        trained = [answer for answer in answers if answer.trained]
        dropped = sum(answer.reasoning_dropped for answer in trained)
        return self._fitted(Encoded(ids, labels, dropped, reasons=sum(answer.reasons for answer in trained)))

    def _finish_passage(self, prompt: list[int], completion: list[int]) -> Encoded:
        ids = [*prompt, *completion, self.tokenizer.eos_token_id]
        untrained = 0 if self.encoding.loss_on == "all" else len(prompt)
        return self._fitted(Encoded(ids, [IGNORED] * untrained + ids[untrained:]))

    def _fitted(self, row: Encoded) -> Encoded:
        """`row` within `max_length`, and with loss on it. BadRow when that cannot be."""
        limit = self.encoding.max_length
        length = len(row.input_ids)
        row.labels[0] = IGNORED
        if length > limit:
            if self.encoding.over_long != "truncate":
                hint = "raise data.max_length, or set data.over_long to skip or truncate"
                what = f"has {length:,} tokens, more than data.max_length = {limit:,}"
                fatal = self.encoding.over_long == "error"
                raise OverLong("", what, hint, reason="has more tokens than data.max_length", fatal=fatal)
            row = replace(row, input_ids=row.input_ids[:limit], labels=row.labels[:limit], truncated=True)
            if not row.loss_tokens:
                what = "has no token that carries loss within data.max_length"
                raise OverLong("", what, "raise data.max_length, or remove the row")
        if not row.loss_tokens:
            raise BadRow("", "has no token that carries loss", "remove the row")
        return row


class OverLong(BadRow):
    """A row has more tokens than `data.max_length`."""


def encode_row(row: Row, template: DataTemplate, tokenizer: Any, encoding: Encoding | None = None) -> Encoded:
    """One row as tokens; DataError says where and why it cannot be. `Encoder` does many at once, faster."""
    answer = Encoder(tokenizer, template, encoding or Encoding()).encode([row])[0]
    if isinstance(answer, BadRow):
        raise DataError(answer.problem(row.where))
    return answer
