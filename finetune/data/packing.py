"""Rows into blocks of one length, so that no token of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets

OPEN_BLOCKS = 64
"""Blocks that wait for a row that fits. More fill better; fewer keep a block's rows nearer to one another."""


def pack(lengths: Iterable[int], size: int) -> list[list[int]]:
    """Blocks of at most `size` tokens, as row numbers: each row goes where it fits best among the open blocks.

    Rows are taken as they come, which is in random order, so every block is a fair sample of the mix. Sorting them by
    length first, as packers do to save the last percent, fills blocks with rows of one length, which often means rows
    of one kind, and the loss then jumps from step to step.
    """
    blocks: list[list[int]] = []
    for row, block in enumerate(_blocks_of(lengths, size)):
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(row)
    return blocks


def count_blocks(lengths: Iterable[int], size: int) -> int:
    """How many blocks `pack` makes."""
    return 1 + max(_blocks_of(lengths, size), default=-1)


def _blocks_of(lengths: Iterable[int], size: int) -> Iterator[int]:
    """The block that each row goes to."""
    count = 0
    spaces: list[tuple[int, int]] = []  # (tokens left, block), fullest first
    for length in lengths:
        assert 0 < length <= size, "rows are fitted to max_length before they are packed"
        fit = bisect_left(spaces, (length, -1))
        if fit < len(spaces):
            space, block = spaces.pop(fit)
        else:
            space, block = size, count
            count += 1
        yield block
        if space > length:
            insort(spaces, (space - length, block))
        if len(spaces) > OPEN_BLOCKS:
            del spaces[0]


def packed(rows: datasets.Dataset, size: int) -> datasets.Dataset:
    """`rows` as blocks: columns input_ids, labels, and seq_lengths, the tokens of each row in a block.

    The trainer's collator makes positions of seq_lengths that start anew with each row; attention follows them, so
    that rows of one block do not see one another.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    table = rows.with_format("arrow")[:]
    lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
    blocks = pack(lengths.tolist(), size)
    order = np.concatenate([np.array(block) for block in blocks])
    row_edges = np.cumsum([0, *map(len, blocks)], dtype=np.int32)
    token_edges = np.concatenate([[0], np.cumsum(lengths[order])])[row_edges].astype(np.int64)
    columns = {
        name: pa.LargeListArray.from_arrays(token_edges, table[name].combine_chunks().take(order).flatten())
        for name in ("input_ids", "labels")
    }
    columns["seq_lengths"] = pa.ListArray.from_arrays(row_edges, lengths[order].astype(np.int32))
    return datasets.Dataset(pa.table(columns))
