"""Rows as they will be trained: every token as text, those with loss marked."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from finetune.data.dataset import Prepared
from finetune.data.encode import IGNORED

if TYPE_CHECKING:
    import datasets

OPEN, CLOSE = "⟦", "⟧"
STYLES = {
    (True, False): "bold green",
    (True, True): "bold magenta",
    (False, False): "dim",
    (False, True): "dim cyan",
}
"""Style by (carries loss, is a token of its own such as <|im_end|> or <think>)."""
BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def render_rows(prepared: Prepared | datasets.Dataset, tokenizer: Any, n: int, *, color: bool) -> Text:
    """The first `n` training rows, decoded.

    color: loss-carrying tokens are bold green (magenta where they are tokens like <|im_end|>), the rest is dim.
        Without color they stand between ⟦ and ⟧, which survives a pipe.

    A `Prepared` also says where each row comes from. Special tokens are shown; control characters are escaped, so
    that no row can steer a terminal.
    """
    places = prepared if isinstance(prepared, Prepared) else None
    rows = prepared.train if isinstance(prepared, Prepared) else prepared
    n = min(n, len(rows))
    marks = "bold green" if color else f"{OPEN}between these{CLOSE}"
    text = Text()
    text.append(f"{n} of {len(rows):,} rows; tokens that carry loss are {marks}\n", style="italic" if color else "")
    for index in range(n):
        row = rows[index]
        ids, labels = row["input_ids"], row["labels"]
        where = places.where(index) if places else f"row {index + 1}"
        text.append("\n")
        text.append(_header(where, labels), style="bold" if color else "")
        text.append("\n")
        body = render_tokens(ids, labels, tokenizer, color=color)
        text.append_text(body)
        if not body.plain.endswith("\n"):
            text.append("\n")
    return text


def render_tokens(ids: Sequence[int], labels: Sequence[int], tokenizer: Any, *, color: bool) -> Text:
    """One row, decoded, with its loss marked as `render_rows` says."""
    text = Text()
    for trained, runs in groupby(_runs(ids, labels, tokenizer), key=lambda run: run[0]):
        if trained and not color:
            text.append(OPEN)
        for _, marker, content in runs:
            text.append(printable(content), style=STYLES[trained, marker] if color else "")
        if trained and not color:
            text.append(CLOSE)
    return text


def _header(where: str, labels: Sequence[int]) -> str:
    trained = sum(label != IGNORED for label in labels)
    return f"── {where} · {len(labels):,} tokens · {trained:,} with loss ({trained / len(labels):.0%}) ──"


def _runs(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[bool, bool, str]]:
    """Carries loss, is an added token, text: for runs of tokens that agree in the first two."""
    added = tokenizer.added_tokens_decoder

    def kind(position: int) -> tuple[bool, bool]:
        return labels[position] != IGNORED, ids[position] in added

    for (trained, marker), positions in groupby(range(len(ids)), key=kind):
        run = [ids[position] for position in positions]
        yield trained, marker, tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def printable(text: str) -> str:
    r"""`text` with control characters but newline and tab as \x1b and the like."""
    if text.isprintable():
        return text
    return "".join(_escaped(character) if _steers(character) else character for character in text)


def _steers(character: str) -> bool:
    """Whether a terminal may act on the character instead of showing it."""
    return character not in "\n\t" and (
        unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in BIDIRECTIONAL
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
