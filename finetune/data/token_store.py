"""Encoded rows of one source in a folder: tokens as an Arrow file that is mapped into memory, and facts of each row.

8 bytes per token on disk, which every process that reads them shares, and 28 per row in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.encode import Encoded
from finetune.data.rows import Row

COLUMNS = ("input_ids", "labels")
ROWS_PER_CHUNK = 1000
TOKENS_PER_CHUNK = 2**20
TOKENS, FACTS = "tokens.arrow", "facts.npz"
FILES = (TOKENS, FACTS)


class TokenWriter:
    """Rows are added in order and never changed.

    seed: keys the hash that says which rows are equal and orders them for the held-out split.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        self._folder, self._seed = folder, seed
        column = pa.list_(pa.int32())
        self._file = (folder / TOKENS).open("wb")
        self._writer = pa.ipc.new_file(self._file, pa.schema([(name, column) for name in COLUMNS]))
        self._waiting: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self._waiting_tokens = 0
        self._numbers, self._lengths, self._loss_tokens = array("q"), array("i"), array("i")
        self._parts, self._hashes = array("i"), array("Q")

    def add(self, row: Row, encoded: Encoded, part: int = 0) -> None:
        """Append one row, of the part-th file of its source."""
        ids = encoded.ids
        self._numbers.append(row.number)
        self._parts.append(part)
        self._lengths.append(len(ids))
        self._loss_tokens.append(encoded.loss_tokens)
        self._hashes.append(_hash(ids, _key(self._seed)))
        self._waiting.append((ids, encoded.targets))
        self._waiting_tokens += len(ids)
        if len(self._waiting) >= ROWS_PER_CHUNK or self._waiting_tokens >= TOKENS_PER_CHUNK:
            self._flush()

    def close(self) -> None:
        """Everything is in the folder's files; OSError where it cannot be."""
        try:
            self._flush()
            self._writer.close()
        finally:
            self._file.close()
        facts = {
            "numbers": np.array(self._numbers, np.int64),
            "parts": np.array(self._parts, np.int32),
            "lengths": np.array(self._lengths, np.int32),
            "loss_tokens": np.array(self._loss_tokens, np.int32),
            "hashes": np.array(self._hashes, np.uint64),
            "seed": np.array(self._seed, np.uint64),
        }
        with (self._folder / FACTS).open("wb") as file:
            np.savez(file, **facts)  # type: ignore[arg-type]

    def _flush(self) -> None:
        if not self._waiting:
            return
        import pyarrow as pa

        offsets = np.cumsum([0, *(len(ids) for ids, _ in self._waiting)], dtype=np.int32)
        lists = [
            pa.ListArray.from_arrays(offsets, np.concatenate(column)) for column in zip(*self._waiting, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(lists, names=list(COLUMNS)))
        self._waiting, self._waiting_tokens = [], 0


class TokenStore:
    """Rows that a `TokenWriter` wrote.

    table: Arrow table with list<int32> columns input_ids and labels, in the order rows were added, read when needed.
    numbers: line or row number of each row.  parts: which file of the source each row is in.
    lengths, loss_tokens: tokens of each row, and those that carry loss.
    hashes: equal for rows with equal input_ids; otherwise different, but for one chance in 2**64 per pair.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        import pyarrow as pa

        self.table: Any = pa.ipc.open_file(pa.memory_map(str(folder / TOKENS))).read_all()
        with np.load(folder / FACTS, allow_pickle=False) as facts:
            self.numbers, self.parts, self.lengths = facts["numbers"], facts["parts"], facts["lengths"]
            self.loss_tokens = facts["loss_tokens"]
            same = int(facts["seed"]) == seed
            self.hashes: NDArray[np.uint64] = facts["hashes"] if same else self._hashed(_key(seed))

    def __len__(self) -> int:
        return len(self.lengths)

    def _hashed(self, key: bytes) -> NDArray[np.uint64]:
        """The hashes for another seed than that of the writer."""
        found = array("Q")
        for batch in self.table.to_batches():
            column = batch.column("input_ids")
            ids, edges = column.values.to_numpy(), column.offsets.to_numpy()
            found.extend(_hash(ids[begin:end], key) for begin, end in pairwise(edges))
        return np.array(found, np.uint64)


def _key(seed: int) -> bytes:
    return seed.to_bytes(8, "little")


def _hash(ids: NDArray[np.int32], key: bytes) -> int:
    return int.from_bytes(blake2b(ids.tobytes(), digest_size=8, key=key).digest(), "little")


def join(stores: Sequence[TokenStore]) -> Any:
    """One Arrow table of all rows, without copying them."""
    import pyarrow as pa

    return pa.concat_tables([store.table for store in stores])
