"""Rows with feedback to tokens: one prompt, the same for every completion, and a mask to the token behind it.

The prompt of a chat is the one that the model's own chat template makes when the model is asked, with thinking off or
on, whichever all completions stand behind. So a reward is about what the model itself would have written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune.data.bad_rows import BadRow
from finetune.data.control_tokens import ControlTokens, check_tokenizer
from finetune.data.conversation import Conversation, Passage
from finetune.data.encode import IGNORED, MOST_ADVICE, Encoder, Encoding, OverLong
from finetune.data.feedback.extract import SAME, SAME_HINT
from finetune.data.feedback.rows import Feedback, kept_columns, read_feedback
from finetune.data.fit import advice
from finetune.data.markers import Markers
from finetune.data.mask import Answer, find_answers, tokens_of
from finetune.data.prompts import Mode
from finetune.data.rows import Row
from finetune.data.templates import Feedbacks, PromptTemplate, message_shape
from finetune.data.unread import mentions, unread_columns
from finetune.errors import DataError, Problem
from finetune.models.text_tokens import LibraryTokens

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows a prompt.

    ids, labels: one label per id: the id where it is compared, -100 elsewhere.
    cut: whether tokens were cut off at the end.
    end: the token that ends it; None where that was cut off.
    """

    ids: list[int]
    labels: list[int]
    cut: bool = False
    end: int | None = None
    reasoning_dropped: int = 0
    reasons: int = 0


@dataclass(frozen=True, slots=True)
class EncodedFeedback:
    """A row as tokens.

    prompt_ids: what the model reads before it writes; every completion follows it.
    completions: the better one first, where there are two.
    mode: the mode of the model's prompt; None for text outside a chat.
    kept: columns for what judges the answers, of prompts.
    mixed: whether one completion reasons and the other does not.
    """

    prompt_ids: list[int]
    completions: tuple[Completion, ...]
    mode: Mode | None = None
    label: bool | None = None
    kept: Fields | None = None
    mixed: bool = False
    unread: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the prompt once, and of the completions."""
        return len(self.prompt_ids) + sum(len(completion.ids) for completion in self.completions)

    @property
    def loss_tokens(self) -> int:
        """Those that are compared."""
        return sum(len(each.labels) - each.labels.count(IGNORED) for each in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model reads."""
        return len(self.prompt_ids) + max((len(each.ids) for each in self.completions), default=0)


class _Draft(NamedTuple):
    """A row before tokens. prompts: what the prompt may be, by mode, the first choice first."""

    feedback: Feedback
    chats: list[Conversation]
    texts: list[str]
    prompts: dict[Mode | None, str]


class FeedbackEncoder:
    """Encodes rows of one template for one tokenizer."""

    def __init__(self, tokenizer: Any, template: Feedbacks, encoding: Encoding) -> None:
        chats = template.texts == "chat"
        self._markers = check_tokenizer(tokenizer, chats=chats, answers=encoding.answers)
        self._control = ControlTokens(tokenizer, self._markers)
        self._chats = Encoder(tokenizer, message_shape(), encoding)
        self.tokenizer, self.template, self.encoding = tokenizer, template, encoding
        self._advised = 0

    def encode(self, rows: Sequence[Row]) -> list[EncodedFeedback | BadRow]:
        """One answer per row, in their order: its tokens, or what is wrong with it."""
        drafts: list[_Draft | BadRow] = []
        for row in rows:
            try:
                drafts.append(self._draft(row))
            except BadRow as error:
                drafts.append(error)
        texts = [
            text for draft in drafts if isinstance(draft, _Draft) for text in (*draft.prompts.values(), *draft.texts)
        ]
        tokens = iter(self._tokenize(texts))
        found: list[EncodedFeedback | BadRow] = []
        for row, draft in zip(rows, drafts, strict=True):
            if isinstance(draft, BadRow):
                found.append(draft)
                continue
            prompts = {mode: list(next(tokens).ids) for mode in draft.prompts}
            completed = [next(tokens) for _ in draft.texts]
            try:
                found.append(self._with_columns(self._finish(draft, prompts, completed), row, draft))
            except BadRow as error:
                found.append(error)
        return found

    def _tokenize(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []

    def _draft(self, row: Row) -> _Draft:
        feedback = self._read(row)
        if isinstance(feedback.prompt, str):
            texts = [text for text in feedback.completions if isinstance(text, str)]
            self._check_texts(feedback.prompt, texts)
            return _Draft(feedback, [], texts, {None: feedback.prompt})
        if isinstance(self._markers, Problem):
            raise DataError(self._markers)
        chats: list[Conversation] = []
        texts = []
        for chat in feedback.completions:
            assert isinstance(chat, Conversation)
            self._control.refuse_in_chat(chat)
            rendered, text = self._chats.rendered(chat)
            chats.append(rendered)
            texts.append(text)
        if not chats:
            self._control.refuse_in_chat(feedback.prompt)
        return _Draft(feedback, chats, texts, self._prompts(feedback.prompt, texts))

    def _read(self, row: Row) -> Feedback:
        try:
            return read_feedback(row.fields, self.template)
        except BadRow as error:
            if self._advised < MOST_ADVICE:
                self._advised += 1
                error.hint = advice(row.fields, self.template, error) or error.hint
            raise

    def _check_texts(self, prompt: str, texts: list[str]) -> None:
        if self.template.control_tokens == "refuse":
            self._control.refuse_in_passage(Passage("", prompt), (self.template.prompt,))
            for name, text in zip(self.template.completions, texts, strict=True):
                self._control.refuse_in_passage(Passage("", text), (name,))

    def _prompts(self, chat: Conversation, texts: list[str]) -> dict[Mode | None, str]:
        """The prompts of the model's chat template that all `texts` begin with."""
        wanted = chat.settings.get("enable_thinking")
        switches: tuple[tuple[Mode, bool | None], ...] = (("off", False), ("on", True))
        if not mentions(str(self.tokenizer.chat_template), "enable_thinking"):
            switches = (("only", None),)
        elif isinstance(wanted, bool) or not texts:
            thinks = wanted if isinstance(wanted, bool) else None
            switches = (("off" if thinks is False else "on", thinks),)
        made = [(mode, self._ask(chat, thinking)) for mode, thinking in switches]
        found: dict[Mode | None, str] = {
            mode: text for mode, text in made if all(each.startswith(text) for each in texts)
        }
        if not found:
            raise self._never_asked(made, texts)
        return found

    def _ask(self, chat: Conversation, thinking: bool | None) -> str:
        settings = {**chat.settings, "add_generation_prompt": True}
        if thinking is not None:
            settings["enable_thinking"] = thinking
        _, text = self._chats.rendered(replace(chat, settings=settings))
        return text

    def _never_asked(self, made: list[tuple[Mode, str]], texts: list[str]) -> BadRow:
        """No prompt of the model leads to every completion."""
        names, prompt = self.template.completions, made[-1][1]
        opening = prompt.rstrip().endswith("<think>")
        at = next(i for i, text in enumerate(texts) if not text.startswith(prompt))
        hint = "end the row with the first answer behind the prompt, or bring its messages into the model's own shape"
        if opening:
            hint = "give every answer reasoning_content, or train a model that answers without thinking"
        end, said = prompt[-30:], texts[at][len(_shared_text(prompt, texts[at])) :][:30]
        what = f"is never asked for: the model's prompt ends with {end!r}, and the row goes on with {said!r}"
        return BadRow(names[at], what, hint, reason="is never asked for by the model's prompt")

    def _finish(self, draft: _Draft, prompts: dict[Mode | None, list[int]], tokens: list[Any]) -> EncodedFeedback:
        if not draft.chats:
            (mode, prompt), *_ = prompts.items()
            completions = tuple(self._of_text(list(each.ids)) for each in tokens)
            return self._fitted(EncodedFeedback(prompt, completions, mode, draft.feedback.label))
        for mode, prompt in prompts.items():
            if all(each.ids[: len(prompt)] == prompt for each in tokens):
                answers = [self._answers(chat, text) for chat, text in zip(draft.chats, draft.texts, strict=True)]
                completions = tuple(
                    self._of_chat(each, found, draft.feedback, prompt)
                    for each, found in zip(tokens, answers, strict=True)
                )
                reasons = {bool(each.reasons) for each in completions}
                row = EncodedFeedback(prompt, completions, mode, draft.feedback.label, mixed=len(reasons) > 1)
                return self._fitted(row)
        hint = "an answer that begins with white space joins the prompt's last token: remove the white space"
        what = "begins with characters that join the last token of the prompt"
        raise BadRow(self.template.completions[0], what, hint)

    def _answers(self, chat: Conversation, text: str) -> list[Answer]:
        assert isinstance(self._markers, Markers)
        return find_answers(text, chat, self._markers)

    def _of_text(self, ids: list[int]) -> Completion:
        ids = [*ids, self.tokenizer.eos_token_id]
        return Completion(ids, list(ids), end=ids[-1])

    def _of_chat(self, tokens: Any, answers: list[Answer], feedback: Feedback, prompt: list[int]) -> Completion:
        """What follows the prompt, with loss on its answers: on all of the first one, whose beginning the prompt is."""
        assert isinstance(feedback.prompt, Conversation)
        before = sum(message["role"] == "assistant" for message in feedback.prompt.messages)
        ids, start = list(tokens.ids), len(prompt)
        labels, end = [IGNORED] * len(ids), None
        behind = answers[before:]
        trained = [a for a in (behind[-1:] if self.encoding.loss_on == "last" else behind) if a.trained]
        for answer in trained:
            begin, stop = tokens_of((answer.begin, answer.end), LibraryTokens(tokens))
            if answer is behind[0]:
                begin = start
            elif not self.encoding.train_empty_think:
                begin = tokens_of((answer.said, answer.end), LibraryTokens(tokens))[0]
            labels[begin:stop] = ids[begin:stop]
            end = ids[stop - 1]
        return Completion(
            ids[start:],
            labels[start:],
            end=end,
            reasoning_dropped=sum(answer.reasoning_dropped for answer in trained),
            reasons=sum(answer.reasons for answer in trained),
        )

    def _fitted(self, row: EncodedFeedback) -> EncodedFeedback:
        """`row` within `max_length`, its prompt whole, and with something to compare. BadRow when that cannot be."""
        limit, names = self.encoding.max_length, self.template.completions
        if row.longest > limit:
            row = self._shortened(row, limit)
        for name, completion in zip(names, row.completions, strict=True):
            if completion.labels.count(IGNORED) == len(completion.labels):
                within = " within data.max_length" if completion.cut else ""
                raise BadRow(name, f"has no token that carries loss{within}", "remove the row")
        if len(row.completions) == 2 and row.completions[0].ids == row.completions[1].ids:
            within = " within data.max_length" if row.completions[0].cut else ""
            raise BadRow(names[1], f"is the same as {names[0]}{within}", SAME_HINT, reason=SAME)
        return row

    def _shortened(self, row: EncodedFeedback, limit: int) -> EncodedFeedback:
        length, room = row.longest, limit - len(row.prompt_ids)
        if self.encoding.over_long != "truncate" or isinstance(self.template, PromptTemplate):
            what = f"has {length:,} tokens, more than data.max_length = {limit:,}"
            hint = "raise data.max_length, or set data.over_long to skip or truncate"
            fatal = self.encoding.over_long != "skip"
            raise OverLong("", what, hint, reason="has more tokens than data.max_length", fatal=fatal)
        if room <= 0:
            what = f"has a prompt of {len(row.prompt_ids):,} tokens, which leaves none of data.max_length = {limit:,}"
            raise OverLong(
                "", what, "raise data.max_length, or remove the row", reason="has a prompt that fills data.max_length"
            )
        return replace(row, completions=tuple(_cut(completion, room) for completion in row.completions))

    def _with_columns(self, found: EncodedFeedback, row: Row, draft: _Draft) -> EncodedFeedback:
        """The row with the columns that are kept, or went nowhere."""
        if isinstance(self.template, PromptTemplate):
            return replace(found, kept=kept_columns(row.fields, self.template))
        made = Passage("", "") if not draft.chats else draft.chats[0]
        unread = unread_columns(row.fields, made, self.template, str(self.tokenizer.chat_template))
        return replace(found, unread=tuple(unread)) if unread else found


def _cut(completion: Completion, room: int) -> Completion:
    if len(completion.ids) <= room:
        return completion
    return replace(completion, ids=completion.ids[:room], labels=completion.labels[:room], cut=True, end=None)


def _shared_text(one: str, other: str) -> str:
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:end]
