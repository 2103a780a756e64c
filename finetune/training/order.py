"""The order of rows over several processes: that of one, each row once in an epoch."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from finetune.training.processes import processes


def missing_rows(rows: int, batch_size: int) -> int:
    """Rows that several processes lack for whole micro-batches; the loader would take some of the others twice."""
    number = processes().num_processes
    return -rows % (number * batch_size) if number > 1 else 0


class BlanksLast(Sampler[int]):
    """Rows in the order that one process would take them in, then blank ones."""

    def __init__(self, rows: int, blanks: int, seed: int) -> None:
        self._order = SeedableRandomSampler(range(rows), data_seed=seed)
        self._rows, self._blanks = rows, blanks

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(self._rows, len(self))

    def __len__(self) -> int:
        return self._rows + self._blanks

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self._order.set_epoch(epoch)
