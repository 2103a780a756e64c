"""What a row asks, and what it wants to hear: its prompt as a model in use sees it, and the answer behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune.data.encode import IGNORED, Encoded

_END_OF_THINKING = "</think>"
_THINKING = re.compile(r"\s*<think>")


@dataclass(frozen=True)
class Question:
    """The last trained answer of a row, and what asks for it.

    prompt_ids: everything before the answer: system prompt, tools, earlier turns with their answers as the row has
        them, and the generation prompt of the thinking mode that leads to the answer.
    prompt: the same as text, control tokens included.
    reference: the answer without its reasoning, stripped.
    """

    prompt_ids: list[int]
    prompt: str
    reference: str

    @property
    def opens_thinking(self) -> bool:
        """Whether the reply begins inside of reasoning."""
        return self.prompt.rstrip().endswith("<think>")


def question_of(row: Encoded, tokenizer: Any) -> Question:
    """The question of an encoded row, which must not be plain text."""
    ids, labels = row.input_ids, row.labels
    end = len(labels)
    while labels[end - 1] == IGNORED:
        end -= 1
    begin = end
    while labels[begin - 1] != IGNORED:  # the first always is
        begin -= 1
    if row.lead is not None and row.lead.prompt_tokens:
        begin = row.lead.prompt_tokens
    prompt = tokenizer.decode(ids[:begin])
    answer = tokenizer.decode(ids[begin:end], skip_special_tokens=True)
    return Question(ids[:begin], prompt, said(answer, opened=prompt.rstrip().endswith("<think>"))[1])


def said(text: str, *, opened: bool) -> tuple[str, str]:
    """Reasoning and answer of a reply, both stripped; all of it is reasoning where that has no end.

    opened: whether the prompt has opened the reasoning already.
    """
    reasoning, closing, answer = text.rpartition(_END_OF_THINKING)
    if closing:
        return _THINKING.sub("", reasoning, count=1).strip(), answer.strip()
    if opened or _THINKING.match(text):
        return _THINKING.sub("", text, count=1).strip(), ""
    return "", text.strip()
