"""What a row says, apart from how: its question, its answers, and what of it is compared with other rows."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.data.conversation import Conversation, Passage
from finetune.data.mask import split_reasoning


@dataclass(frozen=True, slots=True)
class RowText:
    """question: what was asked last, before the last answer.  answers: those with loss.

    said: all but system prompts, which many rows share.  passages: every text that the model sees, one by one; an
        answer's reasoning apart from it.
    """

    question: str
    answers: tuple[str, ...]
    said: str
    passages: tuple[str, ...]


def row_text(found: Conversation | Passage) -> RowText:
    """The texts of what a template made of a row."""
    if isinstance(found, Passage):
        passages = tuple(filter(None, (found.prompt, found.completion)))
        return RowText(found.prompt, (found.completion,), "\n".join(passages), passages)
    asked = ""
    answers: list[str] = []
    said: list[str] = []
    texts: list[str] = []
    for message, trained in zip(found.messages, found.trained, strict=True):
        content = message["content"]
        if message["role"] == "assistant":
            content, reasoning = split_reasoning(message)
            texts.append(reasoning)
            if trained and not message.get("tool_calls"):
                answers.append(content)
        elif message["role"] == "user":
            asked = content
        texts.append(content)
        if message["role"] != "system":
            said.append(content)
    return RowText(asked, tuple(answers), "\n".join(said), tuple(filter(None, texts)))
