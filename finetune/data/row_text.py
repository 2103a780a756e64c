"""What a row says, apart from how: its question, its answers, and what of it is compared with other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.conversation import Conversation, Passage
from finetune.data.feedback.rows import Feedback
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


def feedback_text(found: Feedback) -> RowText:
    """The texts of a prompt with the completions that are compared, labeled, or yet to be written."""
    texts: Sequence[Conversation | Passage]
    if isinstance(found.prompt, str):
        texts = [Passage(found.prompt, str(each)) for each in found.completions] or [Passage(found.prompt, "")]
    else:
        texts = [each for each in found.completions if isinstance(each, Conversation)] or [found.prompt]
    parts = [row_text(each) for each in texts]
    passages = dict.fromkeys(passage for part in parts for passage in part.passages)
    answers = tuple(part.answers[-1] for part in parts if part.answers and found.completions)
    return RowText(parts[0].question, answers, "\n".join(part.said for part in parts), tuple(passages))
