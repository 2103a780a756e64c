"""Where the prompt of two completions ends that are whole conversations or texts: between implicit and explicit.

An implicit prompt is what chosen and rejected both begin with. Taken apart and put together, a row is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from finetune.data.bad_rows import BadRow

S = TypeVar("S", str, list[Any])
Row = dict[str, Any]


def extract_prompt(row: Row) -> Row:
    """A row with `chosen` and `rejected` that both begin with the prompt -> the same with `prompt` apart.

    Of messages, the prompt is the longest beginning that both share; of texts, that up to the last white space in it,
    so that no word is cut. Other columns stay. BadRow when nothing would be left to compare, or no prompt.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("rejected", "is a text and chosen a list, or the other way round", "write both in one way")
    end = shared_text(chosen, rejected) if isinstance(chosen, str) else shared_turns(chosen, rejected)
    return {**row, "prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def join_prompt(row: Row) -> Row:
    """A row with `prompt` apart -> the same with `chosen` and `rejected` that begin with it."""
    rest = {name: value for name, value in row.items() if name != "prompt"}
    return {**rest, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}


def shared_turns(chosen: Sequence[Any], rejected: Sequence[Any], is_answer: Callable[[Any], bool] | None = None) -> int:
    """How many messages both begin with. BadRow where they do not part at an answer of each.

    is_answer: of a message; by its role when None.
    """
    is_answer = is_answer or (lambda message: message.get("role", message.get("from")) in ("assistant", "gpt"))
    end = _shared(chosen, rejected)
    if end == len(chosen) == len(rejected):
        raise BadRow("rejected", "is the same as chosen", SAME_HINT, reason=SAME)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if end == len(messages):
            other = "rejected" if name == "chosen" else "chosen"
            raise BadRow(name, f"is how {other} begins", "let both end with answers to the same prompt")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not is_answer(messages[end]):
            hint = "a preference is between two answers to the same prompt"
            raise BadRow(f"{name}[{end}]", "is where both part, and no turn of the assistant", hint)
    if not end:
        raise BadRow("chosen", "and rejected do not begin with the same prompt", "add the question that both answer")
    return end


def shared_text(chosen: str, rejected: str) -> int:
    """How many characters of both are the prompt. BadRow where none are, or nothing else is."""
    if chosen == rejected:
        raise BadRow("rejected", "is the same as chosen", SAME_HINT, reason=SAME)
    shared = chosen[: _shared(chosen, rejected)]
    end = _last_gap(shared) or len(shared)
    if not end:
        raise BadRow("chosen", "and rejected do not begin with the same prompt", "write it as `prompt`")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[end:].strip():
            raise BadRow(name, "says nothing behind the prompt", "write the completion, or remove the row")
    return end


SAME = "has the same chosen and rejected"
SAME_HINT = "a pair that does not differ teaches nothing: remove the row"


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest beginning that both have."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _last_gap(text: str) -> int:
    """Where the white space before the last word begins; 0 where there is none."""
    end = len(text)
    while end and not text[end - 1].isspace():
        end -= 1
    while end and text[end - 1].isspace():
        end -= 1
    return end
