"""Which rows nearly repeat an earlier one: MinHash over runs of words, looked up in a locality-sensitive index."""

from __future__ import annotations

import re
import zlib
from importlib.util import find_spec

import numpy as np
import regex
from numpy.typing import NDArray

THRESHOLD = 0.8
"""Share of their runs of words (Jaccard) from which on two rows count as near copies."""
RUN_WORDS = 5
MOST_RUNS = 2000
"""Runs of a row that are hashed; of longer rows those with the smallest hashes, which two near copies share."""
MOST_ROWS = 200_000
"""Different rows that later ones are compared with, which bounds the memory: about 4 KB for each."""
PERMUTATIONS, BANDS = 128, (10, 8)
"""10 bands of 8: the index brings up 4 of 5 pairs that are 0.8 alike, and all but 1 in 200 that are 0.9 alike."""
INSTALL = "pip install 'finetune-moe[data]'"
_FACTOR = np.uint32(0x9E3779B1)
_SIGNS = r"()\[\]{}<>=+*/%&|^~@#$\\-"
_ASCII_WORD = re.compile(rf"[a-z0-9]+|[{_SIGNS}]")
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+|[{_SIGNS}\p{{S}}]")


def can_compare() -> bool:
    """Whether the library for it is installed."""
    return find_spec("datasketch") is not None


class NearCopies:
    """Texts are asked about one by one; one that is unlike all before is remembered.

    Comparing with the first of each kind alone keeps the work linear where thousands of rows are alike.
    """

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
        self._blank = MinHash(PERMUTATIONS, hashfunc=int)
        self._remembered: dict[int, NDArray[np.uint32]] = {}
        self.passed_over = 0

    def find(self, number: int, text: str) -> tuple[int, float] | None:
        """The number of an earlier text that this one nearly repeats, and how alike they are; None for a new text.

        A new text is remembered under `number`, unless `MOST_ROWS` are; then it counts as passed over.
        """
        sketch = self._blank.copy()
        sketch.update_batch(runs_of_words(text))
        values = sketch.digest()
        alike = (((values == self._remembered[each]).mean(), -each) for each in self._index.query(sketch))
        share, earlier = max(alike, default=(0.0, 0))
        if share >= THRESHOLD:
            return -earlier, float(share)
        if len(self._remembered) >= MOST_ROWS:
            self.passed_over += 1
        else:
            self._index.insert(number, sketch, check_duplication=False)
            self._remembered[number] = values
        return None


def runs_of_words(text: str) -> list[int]:
    """Hashes of all runs of five words; case, spaces, and punctuation of sentences do not count.

    Brackets, operators and symbols are words, and so are characters of scripts without spaces between words. A text of
    fewer words is one run.
    """
    text = text.casefold()
    words = (_ASCII_WORD.findall(text) if text.isascii() else _WORD.findall(text)) or [text]
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint32, len(words))
    length = min(RUN_WORDS, len(words))
    runs = np.zeros(len(words) - length + 1, np.uint32)
    for place in range(length):
        runs = runs * _FACTOR + hashes[place : place + len(runs)]
    return np.unique(runs)[:MOST_RUNS].tolist()
