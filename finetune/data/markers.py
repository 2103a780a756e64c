r"""What answers begin and end with in the chats that a model's own template renders.

In ChatML a chat is a row of turns `<|im_start|>role\n ... <|im_end|>\n`. Of any other template it is found out by
rendering chats whose texts are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.data.bad_rows import BadRow
from finetune.errors import DataError, Problem
from finetune.models.generation import render_chat

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE_HINT = "the model's chat template writes text of its own, or leaves out what it cannot show"
_ASKED, _ANSWERED = ("Question 4711", "Question 4712"), ("Answer 8151", "Answer 8152")
_NAME_THEM = 'name them in the recipe, such as data.answers: {begin: "<|assistant|>", end: "<|end|>"}'


class Turn(NamedTuple):
    """A part of a rendered chat: an answer, or what comes before one. text: without header and closing token."""

    is_answer: bool
    begin: int
    text: tuple[int, int]
    end: int


@dataclass(frozen=True)
class Markers:
    """begin: right before an answer. end: the token that closes it, which carries loss."""

    begin: str
    end: str

    @property
    def texts(self) -> tuple[str, ...]:
        """What no message may hold."""
        return tuple(text for text in (self.begin.strip(), self.end) if text.strip())

    def turns(self, rendered: str) -> list[Turn]:
        """The parts of a rendered chat, in their order. BadRow for text that is in no turn of ChatML."""
        if self == CHATML:
            return _chatml_turns(rendered)
        found, position = [], 0
        for answer in re.finditer(f"{re.escape(self.begin)}(.*?){re.escape(self.end)}", rendered, re.DOTALL):
            found.append(Turn(False, position, (position, answer.start()), answer.start()))
            found.append(Turn(True, answer.start(), answer.span(1), answer.end()))
            position = answer.end()
        return [*found, Turn(False, position, (position, len(rendered)), len(rendered))]


def _chatml_turns(rendered: str) -> list[Turn]:
    turns, position = [], 0
    while (begin := rendered.find(START, position)) >= 0:
        header = rendered.find("\n", begin)
        end = rendered.find(END, header)
        if header < 0 or end < 0:
            break
        if rendered[position:begin].strip():
            break
        is_answer = rendered[begin + len(START) : header] == "assistant"
        turns.append(Turn(is_answer, begin, (header + 1, end), end + len(END)))
        position = end + len(END)
    if rendered[position:].strip():
        raise BadRow("", "is rendered with text outside its turns", TEMPLATE_HINT)
    return turns


CHATML = Markers(f"{START}assistant\n", END)


def markers_of(tokenizer: Any, named: Markers | None = None) -> Markers | Problem:
    """Those of a tokenizer's chat template; the problem where answers cannot be told apart. named: by the recipe."""
    lacking = [token for token in (START, END) if token not in tokenizer.get_added_vocab()]

    def render(*messages: str, prompt: bool = False) -> str:
        roles = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        return render_chat(tokenizer, roles, add_generation_prompt=prompt)

    try:
        chat = render(_ASKED[0], _ANSWERED[0], _ASKED[1], _ANSWERED[1])
    except DataError:
        raise
    except Exception:  # templates fail with whatever Python raises
        chat = ""
    if named is not None:
        if _fits(named, chat):
            return named
        what = f"does not write {named.begin!r} before every answer and {named.end!r} behind it"
        return Problem("data.answers", what, "compare with what `finetune prepare` or the model card shows", chat)
    if START not in chat:
        found = _found(chat, render, tokenizer.all_special_tokens)
        if found is not None:
            return found
    if not lacking:
        return CHATML
    if START in chat:
        return Problem("tokenizer", f"does not know {' and '.join(lacking)}", "use the tokenizer of the same model")
    return Problem("chat template", "does not tell where answers begin and end", _NAME_THEM, chat or None)


def _found(chat: str, render: Callable[..., str], special: list[str]) -> Markers | None:
    """What stands before and behind the answers of a chat; None where they have nothing in common, or no token."""
    places = [chat.find(text) for text in (_ASKED[0], _ANSWERED[0], _ASKED[1], _ANSWERED[1])]
    if -1 in places or places != sorted(places):
        return None
    before = chat[places[0] + len(_ASKED[0]) : places[1]]
    try:
        asked, prompt = (render(_ASKED[0], prompt=on).partition(_ASKED[0])[2] for on in (False, True))
    except DataError:
        raise
    except Exception:
        return None
    begin = prompt if before.startswith(prompt) else before.rstrip(" ")
    if begin.startswith(asked) and begin[len(asked) :].strip():
        begin = begin[len(asked) :]  # what closes the question is no part of it
    behind = chat[places[3] + len(_ANSWERED[1]) :].lstrip()
    end = max((token for token in special if token and behind.startswith(token)), key=len, default=None)
    markers = None if end is None else Markers(begin.lstrip("\n"), end)
    return markers if markers is not None and _fits(markers, chat) else None


def _fits(markers: Markers, chat: str) -> bool:
    """Whether the answers of the known chat, and nothing else of it, are between the markers."""
    if not markers.begin.strip() or not markers.end:
        return False
    turns = markers.turns(chat)
    answers = [chat[slice(*turn.text)].strip() for turn in turns if turn.is_answer]
    others = "".join(chat[slice(*turn.text)] for turn in turns if not turn.is_answer)
    return answers == list(_ANSWERED) and all(text in others for text in _ASKED)
