"""Encoded rows of one file, held as Arrow columns: 8 bytes per token, and a few per row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.encode import Encoded
from finetune.data.rows import Row

COLUMNS = ("input_ids", "labels")
ROWS_PER_CHUNK = 1000


class TokenStore:
    """Rows are added in order and never changed.

    seed: keys the hash that says which rows are equal and orders them for the held-out split.
    """

    def __init__(self, seed: int) -> None:
        self._key = seed.to_bytes(8, "little")
        self._chunks: list[Any] = []
        self._waiting: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self._numbers, self._lengths, self._loss_tokens = array("q"), array("i"), array("i")
        self._parts = array("i")
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, row: Row, encoded: Encoded, part: int = 0) -> None:
        """Append one row, of the part-th file of its source."""
        ids, labels = encoded.ids, encoded.targets
        digest = blake2b(ids.tobytes(), digest_size=8, key=self._key).digest()
        self._numbers.append(row.number)
        self._parts.append(part)
        self._lengths.append(len(ids))
        self._loss_tokens.append(encoded.loss_tokens)
        self._hashes.append(int.from_bytes(digest, "little"))
        self._waiting.append((ids, labels))
        if len(self._waiting) >= ROWS_PER_CHUNK:
            self._flush()

    def chunks(self) -> list[Any]:
        """Arrow tables with list<int32> columns input_ids and labels, in the order rows were added."""
        self._flush()
        return self._chunks

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Line or row number of each row."""
        return np.array(self._numbers, np.int64)

    @property
    def parts(self) -> NDArray[np.int64]:
        """Which file of the source each row is in."""
        return np.array(self._parts, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.array(self._lengths, np.int64)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Tokens of each row that carry loss."""
        return np.array(self._loss_tokens, np.int64)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """Equal for rows with equal input_ids; otherwise different, but for one chance in 2**64 per pair."""
        return np.array(self._hashes, np.uint64)

    def _flush(self) -> None:
        if not self._waiting:
            return
        import pyarrow as pa  # type: ignore[import-untyped]

        offsets = np.cumsum([0, *(len(ids) for ids, _ in self._waiting)], dtype=np.int32)
        lists = [
            pa.ListArray.from_arrays(offsets, np.concatenate(column)) for column in zip(*self._waiting, strict=True)
        ]
        self._chunks.append(pa.Table.from_arrays(lists, names=list(COLUMNS)))
        self._waiting = []


def join(stores: Sequence[TokenStore]) -> Any:
    """One Arrow table of all rows, without copying them."""
    import pyarrow as pa

    return pa.concat_tables([chunk for store in stores for chunk in store.chunks()])
