"""Tokens of text by its words: the library tokenizes each word once, and the next text that has it looks it up.

What byte-level BPE makes of a word does not depend on the words around it, and where words end is a regular expression
in the tokenizer's own file. That expression is run here over characters of which this module knows for certain what
class they are; any other text, and any other kind of tokenizer, is left to the library.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
SPANS = ((0x0, 0xDFF), (0x1E00, 0x2BFF), (0xFE0F, 0xFE0F), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF))
"""Code points of scripts that put spaces between words, of symbols and of emoji; others seldom repeat a word."""
LONG_S = 0x17F
"""It is an `s` where case is ignored, in some engines."""
MOST_WORDS = 200_000
LONGEST_WORD = 64
PROBE = (
    "It's I'LL we'Re 's x\u00e9\u0301 12345 \u00bd\u00b2 a\tb \r\n\r\n  c \n d!?"
    "\u2019s (\u201cq\u201d) --> \u20ac9 \u0439\u044b\u200b\ufe0f\U0001f600 _\x1c\x85\xa0z   "
)
"""A text with every class of character, which the library and this module must split alike."""


class WordTokens:
    """One text as tokens. ids: (tokens,) int32."""

    __slots__ = ("_begins", "_buffers", "_lengths", "_pieces", "_table", "ids")

    def __init__(self, pieces: list[Any], lengths: list[int], buffers: list[bytes], table: _Words) -> None:
        self.ids: Ids = np.frombuffer(b"".join(buffers), np.int32)
        self._pieces, self._lengths, self._buffers, self._table = pieces, lengths, buffers, table
        self._begins: tuple[list[int], list[int]] | None = None

    def first_from(self, position: int) -> int:
        """The first token that begins at or after the character at `position`; their number when there is none."""
        characters, tokens = self._begins or self._measured()
        index = bisect_right(characters, position) - 1
        inside, token = position - characters[index], tokens[index]
        if not inside:
            while index and characters[index - 1] == position:  # nothing stands between two tokens of their own
                index -= 1
            return tokens[index]
        words = self._pieces[index]
        if isinstance(words, str):
            return token + 1
        passed = 0
        for word in words:
            if passed >= inside:
                break
            token += len(self._table[word]) >> 2
            passed += len(word)
            if passed > inside:
                return token - self._table.begin_from(word, inside - passed + len(word))
        return token

    def _measured(self) -> tuple[list[int], list[int]]:
        """Where each piece begins, in characters and in tokens."""
        characters = list(accumulate(self._lengths, initial=0))
        tokens = list(accumulate([len(buffer) >> 2 for buffer in self._buffers], initial=0))
        self._pieces.append(())
        self._begins = characters, tokens
        return self._begins


class WordTokenizer:
    """Tokenizes by words with the help of a `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any, words: re.Pattern[str], added: dict[str, int]) -> None:
        self._split = words.findall
        self._table = _Words(backend)
        self._strange = re.compile(f"[^{_in_class(_known())}]")
        self._added = {text: np.int32(token).tobytes() for text, token in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._between = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def encode(self, text: str) -> WordTokens | None:
        """`text` as tokens, without those that a tokenizer puts around it; None when the library has to do it."""
        if not text.isascii() and (self._strange.search(text) or not unicodedata.is_normalized("NFC", text)):
            return None
        table, split, added = self._table, self._split, self._added
        lookup = table.__getitem__
        pieces: list[Any] = self._between.split(text) if self._between is not None else [text]
        lengths = list(map(len, pieces))
        buffers = []
        for index, piece in enumerate(pieces):
            if index & 1:
                buffers.append(added[piece])
            else:
                pieces[index] = words = split(piece)
                buffers.append(b"".join(map(lookup, words)))
        return WordTokens(pieces, lengths, buffers, table)


class _Words(dict[str, bytes]):
    """Words and their token ids as bytes, made when first asked for."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._backend.encode(word, add_special_tokens=False).ids, np.int32).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[sys.intern(word)] = ids
        return ids

    def begin_from(self, word: str, position: int) -> int:
        """Tokens of a word that begin at or after one of its characters."""
        offsets = self._backend.encode(word, add_special_tokens=False).offsets
        return sum(begin >= position for begin, _ in offsets)


def word_tokenizer(tokenizer: Any) -> WordTokenizer | None:
    """What tokenizes by words as `tokenizer` does; None for a kind of tokenizer that this module does not know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or backend.padding is not None:
        return None
    tokens = backend.get_added_tokens_decoder()
    plain = not any(
        token.single_word or token.lstrip or token.rstrip or token.normalized or not token.content
        for token in tokens.values()
    )
    pattern = _pattern_of(backend)
    if not plain or pattern is None or (words := _translated(pattern)) is None:
        return None
    added = {token.content: number for number, token in tokens.items()}
    made = WordTokenizer(backend, words, added)
    return made if _alike(made, backend, PROBE + "".join(added)) else None


def _alike(made: WordTokenizer, backend: Any, probe: str) -> bool:
    found = made.encode(probe)
    return found is not None and found.ids.tolist() == backend.encode(probe, add_special_tokens=False).ids


def _pattern_of(backend: Any) -> str | None:
    """The expression that a byte-level BPE tokenizer splits text by; None for any other kind."""
    normalizer, before, behind = map(_settings, (backend.normalizer, backend.pre_tokenizer, backend.post_processor))
    steps = before.get("pretokenizers", [])
    known = (
        type(backend.model).__name__ == "BPE"
        and not backend.model.dropout
        and normalizer.get("type") in (None, "NFC")
        and (not behind or (behind["type"] == "ByteLevel" and not behind["trim_offsets"]))
        and before.get("type") == "Sequence"
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
    )
    if not known:
        return None
    split, as_bytes = steps
    fits = split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]
    return split["pattern"]["Regex"] if fits and not (as_bytes["add_prefix_space"] or as_bytes["use_regex"]) else None


def _settings(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file has it; empty for none."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings


_PART = re.compile(r"\\p\{(\w+)\}|\\(s|S)|(\\[rn])|(\\.)|(\[\^?|\]|&&|\(\?>|\+\+|\*\+|\?\+)|(.)", re.DOTALL)


@lru_cache(8)
def _translated(pattern: str) -> re.Pattern[str] | None:
    """The expression in Python's notation, for known characters; None when it has what is not translated."""
    made, inside = [], False
    for found in _PART.finditer(pattern):
        kind, space, line, other, bracket, _ = found.groups()
        if other or bracket in ("&&", "(?>", "++", "*+", "?+") or (space == "S" and inside):
            return None
        if kind or space:
            members = _in_class(_members(f"\\p{{{kind}}}" if kind else "\\s"))
            made.append(members if inside else f"[{'^' if space == 'S' else ''}{members}]")
        else:
            if bracket:
                inside = bracket != "]"
            made.append(line or found.group())
    words = re.compile("".join(made))
    return words if not words.groups else None


@lru_cache(1)
def _known() -> tuple[int, ...]:
    """Code points of SPANS that have a name since long."""
    codes = (code for begin, end in SPANS for code in range(begin, end + 1))
    return tuple(code for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Cs") and code != LONG_S)


@lru_cache(64)
def _members(kind: str) -> tuple[int, ...]:
    """Those of the known code points that the library's regular expressions take for a class."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    text = "".join(map(chr, _known()))
    found = Split(Regex(f"{kind}+"), "removed", invert=True).pre_tokenize_str(text)
    return tuple(_known()[index] for _, (begin, end) in found for index in range(begin, end))


def _in_class(codes: tuple[int, ...]) -> str:
    """Code points as ranges inside of brackets."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{re.escape(chr(begin))}-{re.escape(chr(end))}" for begin, end in ranges)
