"""Whether the prompt that a chat template makes leads to the answer that is trained.

A model in use sees the generation prompt of its own chat template, with thinking on, off, or in the only mode that
there is. Unless its tokens are the ones the trained answer stands behind, what was trained is never asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.conversation import Conversation
from finetune.data.mask import Answer, Tokens, token_at
from finetune.errors import DataError

Mode = Literal["on", "off", "only"]
"""Thinking on or off; `only` where a template makes the same prompt for both."""
LOOKED_AT = 4
"""Rows of one kind whose prompts are rendered whole; of the others only what the prompt ends with is compared."""


MOST_KINDS = 10_000
"""Kinds that are remembered at a time."""


@dataclass(frozen=True, slots=True)
class Lead:
    """How one row is asked for.

    mode: the mode whose prompt leads to its last trained answer; None when none does, and `why` says why not.
    earlier: trained answers before the last that stand where the model would think, and show no thinking.
    prompt_tokens: of the row's tokens, how many are that prompt; 0 where none leads to the answer.
    """

    mode: Mode | None
    why: str = ""
    earlier: int = 0
    prompt_tokens: int = field(default=0, compare=False)


class Prompts:
    """The generation prompts of a tokenizer's chat template.

    render: messages, tools and settings of `apply_chat_template` -> text.  tokenize: text -> tokens.
    begin: what stands right before every answer.
    """

    def __init__(self, render: Callable[..., str], tokenize: Callable[[str], Tokens], begin: str) -> None:
        self._render, self._tokenize, self._begin = render, tokenize, begin
        self._ids: dict[str, bytes] = {}
        self._ends: dict[Any, dict[Mode, str]] = {}
        self._seen: Counter[Any] = Counter()

    def lead(self, chat: Conversation, text: str, tokens: Tokens, answers: list[Answer]) -> Lead:
        """How the last trained answer of a rendered row is asked for."""
        last = max(index for index, answer in enumerate(answers) if answer.trained)
        at = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"][last]
        kind = _kind(chat, at)
        header = text.rfind(self._begin, 0, answers[last].begin)
        if header < 0:
            return self._by_tokens(chat, at, tokens.ids, text[answers[last].begin :])
        ends = self._ends.get(kind)
        if ends is None or self._seen[kind] < LOOKED_AT:
            if len(self._seen) > MOST_KINDS:
                self._ends.clear()
                self._seen.clear()
            self._seen[kind] += 1
            ends = self._rendered(chat, at, text[:header])
            self._ends[kind] = ends
        if not ends:
            return Lead(None, "the chat template cannot ask for it, or shows what comes before it differently then")
        first = token_at(header, tokens)
        fitting = [mode for mode, end in ends.items() if self._stands(end, tokens.ids, first)]
        wanted = chat.settings.get("enable_thinking")
        if isinstance(wanted, bool) and "only" not in ends:
            fitting = [mode for mode in fitting if mode == ("on" if wanted else "off")]
        thinks = "on" in ends or "<think>" in ends.get("only", "")
        earlier = sum(answer.trained and not _shows_thinking(text, answer) for answer in answers[:last])
        if not fitting:
            why = _why(ends, text, header, answers[last])
            if isinstance(wanted, bool) and "only" not in ends:
                why = f"they say enable_thinking: {str(wanted).lower()}, and that prompt does not lead to the answer"
            return Lead(None, why, earlier if thinks else 0)
        mode = "off" if "off" in fitting else fitting[0]
        prompt_tokens = first + len(self._ids[ends[mode]]) // tokens.ids.itemsize
        return Lead(mode, earlier=earlier if thinks else 0, prompt_tokens=prompt_tokens)

    def _rendered(self, chat: Conversation, at: int, before: str) -> dict[Mode, str]:
        """What the prompt of each mode ends with, from its last header on; none whose beginning is not `before`."""
        ends: dict[Mode, str] = {}
        for mode, prompt in self._prompts(chat, at).items():
            header = prompt.rfind(self._begin)
            if header >= 0 and prompt[:header] == before:
                ends[mode] = prompt[header:]
        return ends

    def _prompts(self, chat: Conversation, at: int) -> dict[Mode, str]:
        """The prompt of each mode for the message at an index; `only` where both are one."""
        found: dict[Mode, str] = {}
        settings = {name: value for name, value in chat.settings.items() if name != "enable_thinking"}
        modes: tuple[tuple[Mode, bool], ...] = (("on", True), ("off", False))
        for mode, thinking in modes:
            try:
                options = {**settings, "enable_thinking": thinking, "add_generation_prompt": True}
                found[mode] = self._render(chat.messages[:at], chat.tools, options)
            except DataError:
                raise
            except Exception:  # templates fail with whatever Python raises
                continue
        if len(found) == 2 and found["on"] == found["off"]:
            return {"only": found["on"]}
        return found

    def _by_tokens(self, chat: Conversation, at: int, ids: NDArray[np.int32], said: str) -> Lead:
        """The same where no known header stands before the answer, by all tokens of every prompt."""
        prompts = self._prompts(chat, at)
        for mode in ("off", "on", "only"):
            if mode in prompts:
                wanted = self._tokenize(prompts[mode]).ids
                if _begin_with(ids, wanted.tobytes()):
                    return Lead(mode, prompt_tokens=len(wanted))
        if not prompts:
            return Lead(None, "the chat template cannot ask for it")
        shown = next(iter(prompts.values()))[-30:]
        return Lead(None, f"the prompt ends with {shown!r}, and what is trained begins with {said[:30]!r}")

    def _stands(self, end: str, ids: NDArray[np.int32], first: int) -> bool:
        if end not in self._ids:
            self._ids[end] = self._tokenize(end).ids.tobytes()
        return _begin_with(ids[first:], self._ids[end])


def _begin_with(ids: NDArray[np.int32], wanted: bytes) -> bool:
    return ids[: len(wanted) // ids.itemsize].tobytes() == wanted


def _kind(chat: Conversation, at: int) -> tuple[Any, ...]:
    """What the prompt of an answer may depend on, but for the texts."""
    turns = tuple(
        (message["role"], "tool_calls" in message, "reasoning_content" in message or "</think>" in message["content"])
        for message in chat.messages
    )
    settings = hash(repr(sorted(chat.settings.items(), key=str))) if chat.settings else 0
    return turns, at, bool(chat.tools), settings


def _shows_thinking(text: str, answer: Answer) -> bool:
    return text.startswith("<think>", answer.begin)


def _why(ends: dict[Mode, str], text: str, header: int, answer: Answer) -> str:
    """Why no prompt leads to an answer, and what to do."""
    said = text[answer.begin : answer.end]
    opening = [end for end in ends.values() if end.rstrip().endswith("<think>")]
    if opening and not answer.reasons:
        return (
            "they have no reasoning, and the prompt of this model opens <think>: give them reasoning_content, or train"
            " a model that answers without"
        )
    if any(text.startswith(end, header) for end in ends.values()) and said[:1].isspace():
        return "the answer begins with white space, which joins the last token of the prompt: remove it"
    if not opening and said.startswith("<think>") and answer.reasons:
        return "they reason, and the prompt of this model goes straight to the answer: remove their reasoning"
    shown = next(iter(ends.values()))[-30:]
    return f"the prompt ends with {shown!r}, and what is trained begins with {said[:30]!r}"
