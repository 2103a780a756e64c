"""Texts as tokens: by words where that is possible, and by the library otherwise."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from finetune.models.word_tokens import Ids, WordTokens, word_tokenizer

logger = logging.getLogger(__name__)

CHECKED = 64
"""First texts that are tokenized both ways."""


class TextTokenizer:
    """Tokenizes texts as a fast tokenizer does, without the tokens that it puts around them."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer([""], add_special_tokens=False, verbose=False)  # turns off cutting and filling up
        self._backend = tokenizer.backend_tokenizer
        self._words = word_tokenizer(tokenizer)
        self._checked = 0

    def __call__(self, texts: list[str]) -> list[WordTokens | LibraryTokens]:
        """One answer per text, in their order."""
        if self._words is None:
            return list(map(LibraryTokens, self._backend.encode_batch(texts, add_special_tokens=False)))
        found: list[WordTokens | LibraryTokens | None] = list(map(self._words.encode, texts))
        for text, tokens in zip(texts, found, strict=True):
            if self._checked == CHECKED:
                break
            self._checked += 1
            if tokens is not None and tokens.ids.tolist() != self._backend.encode(text, add_special_tokens=False).ids:
                logger.warning("the tokenizer splits %r in a way of its own: its library does all of it", text[:80])
                self._words = None
                return self(texts)
        left = [index for index, tokens in enumerate(found) if tokens is None]
        if left:
            made = self._backend.encode_batch([texts[index] for index in left], add_special_tokens=False)
            for index, encoding in zip(left, made, strict=True):
                found[index] = LibraryTokens(encoding)
        return [tokens for tokens in found if tokens is not None]


class LibraryTokens:
    """One text as tokens, as the library has them. ids: (tokens,) int32."""

    __slots__ = ("_encoding", "ids")

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.ids: Ids = np.array(encoding.ids, np.int32)

    def first_from(self, position: int) -> int:
        """The first token that begins at or after the character at `position`; their number when there is none."""
        encoding, number = self._encoding, len(self.ids)
        chars = encoding.token_to_chars(number - 1) if number else None
        last = chars[1] if chars else 0
        token = None
        while token is None and position < last:
            token = encoding.char_to_token(position)
            position += 1
        if token is None:
            return number
        begin = encoding.token_to_chars(token)
        if begin[0] < position - 1:
            while token < number and encoding.token_to_chars(token) == begin:
                token += 1
        return int(token)
