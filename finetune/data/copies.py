"""Rows that repeat others: exact copies, near copies, and held-out rows that are trained as well."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.feedback.prepare import held_out as held_out_prompts
from finetune.data.mix import hold_out
from finetune.data.near import INSTALL, MOST_ROWS, NearCopies
from finetune.data.quality_report import Example, Finding
from finetune.data.rows import place

EXACT = ("exact_copy", "exact copies of an earlier row", "remove them, unless they are to count more than once")
NEAR = (
    "near_copy",
    "near copies of an earlier row",
    "keep one of each kind; if only a long instruction is alike, write it as a system prompt, which is not compared",
)
HELD_OUT = (
    "held_out_copy",
    "held out, and trained as well",
    "remove them from data.train or from data.eval: the evaluation flatters",
)
HELD_OUT_NEAR = (
    "held_out_near_copy",
    "held out, and a near copy is trained",
    "remove near copies first, or hold out another file: the evaluation flatters",
)


class Copies:
    """Every row of every file, training rows first, with the earlier one that it repeats; about 60 bytes for a row.

    seed: the recipe's, which keys the hash that decides which rows are held out.
    near: whether to look for near copies too.
    """

    def __init__(self, seed: int, *, near: bool) -> None:
        self.near = NearCopies() if near else None
        self._key = seed.to_bytes(8, "little")
        self._first: dict[int, int] = {}
        self._hashes, self._prompts, self._alike_to = array("Q"), array("Q"), array("q")
        self._sources: list[str] = []
        self._source, self._numbers = array("i"), array("q")
        self._trained, self._held = array("b"), array("b")

    def add(
        self,
        source: str,
        number: int,
        ids: Sequence[int],
        said: str,
        *,
        trained: bool,
        held: bool,
        prompt: Sequence[int] | None = None,
    ) -> tuple[tuple[str, str, str], Example] | None:
        """Take a row; what it repeats and which one, if it does.

        ids: its tokens; rows of equal tokens are exact copies.  said: what is compared for near copies.
        trained, held: whether it is among the rows to train on, or in a file of held-out rows.
        prompt: its tokens, where rows are held out by their prompts.
        """
        index = self._remember(source, number, ids, trained=trained, held=held)
        if prompt is not None:
            self._prompts.append(self._hash(np.array(prompt, np.uint64)))
        first = self._first.setdefault(self._hashes[index], index)
        share, kinds = None, (EXACT, HELD_OUT)
        if first != index:
            self._alike_to.append(self._alike_to[first])
        elif self.near is not None and (found := self.near.find(index, said)) is not None:
            first, share = found
            kinds = (NEAR, HELD_OUT_NEAR)
            self._alike_to.append(first)
        else:
            self._alike_to.append(index)
            return None
        kind = kinds[1 if held and self._trained[first] else 0]
        return kind, Example(self.where(index), self.where(first), None if share is None else round(share, 2))

    def _remember(self, source: str, number: int, ids: Sequence[int], *, trained: bool, held: bool) -> int:
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        self._hashes.append(self._hash(np.array(ids, np.int32)))
        self._source.append(len(self._sources) - 1)
        self._numbers.append(number)
        self._trained.append(trained)
        self._held.append(held)
        return len(self._numbers) - 1

    def _hash(self, values: NDArray[Any]) -> int:
        return int.from_bytes(blake2b(values.tobytes(), digest_size=8, key=self._key).digest(), "little")

    def where(self, index: int) -> str:
        """`file:line` of a row."""
        return place(self._sources[self._source[index]], self._numbers[index])

    def held_out(self, fraction: float) -> tuple[int, Finding]:
        """How many training rows `data.eval_fraction` holds out, and those of them with near copies that are trained.

        Exact copies, or all rows of a prompt, are on one side.
        """
        pool = np.flatnonzero(np.array(self._trained, bool))
        if self._prompts:
            held = held_out_prompts(np.array(self._prompts, np.uint64)[pool], fraction)
            left, out = pool[~held], pool[held]
        else:
            left, out = (pool[side] for side in hold_out(np.array(self._hashes, np.uint64)[pool], fraction))
        alike_to = np.array(self._alike_to, np.int64)
        groups, first = np.unique(alike_to[left], return_index=True)
        kind, what, remedy = HELD_OUT_NEAR
        finding = Finding(kind, "data.eval_fraction", what, remedy)
        for index in out:
            at = np.searchsorted(groups, alike_to[index])
            if at < len(groups) and groups[at] == alike_to[index]:
                finding.add(Example(self.where(index), self.where(left[first[at]])))
        return len(out), finding

    def not_looked_for(self) -> list[str]:
        """Near copies that were passed over."""
        if self.near is None:
            return [f"near copies: datasketch is not installed ({INSTALL})"]
        if past := self.near.passed_over:
            return [f"near copies of {past:,} rows: rows are compared with the first {MOST_ROWS:,} different ones"]
        return []
