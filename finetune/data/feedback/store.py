"""Encoded rows with feedback of one file, held as Arrow columns."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.objectives import RowKind
from finetune.data.feedback.tokens import EncodedFeedback
from finetune.data.rows import Row

COMPLETIONS: dict[RowKind, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "labeled": ("completion",),
    "prompt": (),
}
"""What columns of completions are called; each is `NAME_ids` and `NAME_labels`."""
ROWS_PER_CHUNK = 1000
Column = NDArray[np.int64]
Hashes = NDArray[np.uint64]


class FeedbackStore:
    """Rows are added in order and never changed.

    seed: keys the hashes, equal for equal tokens and otherwise different, but for one chance in 2**64 per pair.
    """

    def __init__(self, kind: RowKind, seed: int) -> None:
        self._kind, self._key = kind, seed.to_bytes(8, "little")
        self._chunks: list[Any] = []
        self._waiting: list[EncodedFeedback] = []
        self._columns = {name: array("q") for name in ("number", "part", "tokens", "loss_tokens", "longest", "label")}
        self._columns |= {name: array("q") for name in COMPLETIONS[kind]}
        self._hashes = {name: array("Q") for name in ("prompt", "row", "swapped", "unlabeled")}

    def __len__(self) -> int:
        return len(self._columns["number"])

    def add(self, row: Row, encoded: EncodedFeedback, part: int = 0) -> None:
        """Append one row, of the part-th file of its source."""
        facts = {
            "number": row.number,
            "part": part,
            "tokens": encoded.tokens,
            "loss_tokens": encoded.loss_tokens,
            "longest": encoded.longest,
            "label": bool(encoded.label),
        }
        names = COMPLETIONS[self._kind]
        facts |= {name: len(each.ids) for name, each in zip(names, encoded.completions, strict=True)}
        for name, value in facts.items():
            self._columns[name].append(value)
        prompt = self._hash(encoded.prompt_ids)
        parts = [self._hash(completion.ids) for completion in encoded.completions]
        kept = json.dumps(encoded.kept, sort_keys=True, default=str).encode() if encoded.kept else b""
        unlabeled = self._hash([prompt, *parts], kept)
        self._hashes["prompt"].append(prompt)
        self._hashes["row"].append(self._hash([unlabeled, bool(encoded.label)]))
        self._hashes["swapped"].append(self._hash([self._hash([prompt, *reversed(parts)], kept), bool(encoded.label)]))
        self._hashes["unlabeled"].append(unlabeled)
        self._waiting.append(encoded)
        if len(self._waiting) >= ROWS_PER_CHUNK:
            self._flush()

    def _hash(self, values: Sequence[int], more: bytes = b"") -> int:
        data = np.array(values, np.uint64).tobytes() + more
        return int.from_bytes(blake2b(data, digest_size=8, key=self._key).digest(), "little")

    def column(self, name: str) -> Column:
        """Of each row: number, part, tokens, loss_tokens, longest, label, or the tokens of a completion by its name."""
        return np.array(self._columns[name], np.int64)

    def hashes(self, name: str) -> Hashes:
        """Of each row: its prompt, the row, the row with its completions swapped, or without its label (unlabeled)."""
        return np.array(self._hashes[name], np.uint64)

    def chunks(self) -> list[Any]:
        """Arrow tables in the order rows were added.

        Columns: prompt_ids, for each completion NAME_ids and NAME_labels (list<int32>), and label (bool) of labeled
        rows, or kept (JSON text) of prompts.
        """
        self._flush()
        return self._chunks

    def _flush(self) -> None:
        if not self._waiting:
            return
        import pyarrow as pa  # type: ignore[import-untyped]

        rows, self._waiting = self._waiting, []
        columns = {"prompt_ids": _lists([row.prompt_ids for row in rows])}
        for index, name in enumerate(COMPLETIONS[self._kind]):
            columns[f"{name}_ids"] = _lists([row.completions[index].ids for row in rows])
            columns[f"{name}_labels"] = _lists([row.completions[index].labels for row in rows])
        if self._kind == "labeled":
            columns["label"] = pa.array([bool(row.label) for row in rows])
        if self._kind == "prompt":
            texts = [json.dumps(row.kept or {}, ensure_ascii=False, default=str) for row in rows]
            columns["kept"] = pa.array(texts, pa.large_string())
        self._chunks.append(pa.table(columns))


def _lists(values: list[list[int]]) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.array(each, np.int32) for each in values]))
