"""The walk of the data: files -> rows -> tokens -> a mix to train on and rows held out."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import DataSection
from finetune.data.mix import choose, draw_counts, hold_out
from finetune.data.packing import count_blocks
from finetune.data.prepare_report import PrepareReport, SplitReport
from finetune.data.rows import place
from finetune.data.source import Progress, Source
from finetune.data.token_store import join
from finetune.errors import DataError, Problem

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Prepared:
    """Rows ready for a trainer.

    train, eval: `datasets.Dataset`s with columns input_ids and labels (list<int32>, -100 where there is no loss),
        mapped from disk. Training rows are mixed and shuffled; held-out rows keep the order of their files.
    report: what became of the rows.
    train_places, eval_places: (rows, 3) index of a source, line, and which file of the source, for each row.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: PrepareReport
    train_places: NDArray[np.int32]
    eval_places: NDArray[np.int32]

    def where(self, index: int, split: str = "train") -> str:
        """`file:line` that row `index` of a split came from."""
        source, number, part = (self.train_places if split == "train" else self.eval_places)[index]
        return place(self.report.files[source].parts[part], int(number))


def prepare(section: DataSection, tokenizer: Any, *, seed: int, progress: Progress | None = None) -> Prepared:
    """Read, encode, mix, shuffle and split the rows of a recipe's `data` section.

    Without weights every row of every file is drawn. With `weight`s of 2 and 1, two of three rows come from the first
    file, and the mix is the largest in which no row is drawn twice (to repeat a file, list it twice).
    `eval_fraction` is the share of the drawn rows that is held out; a held-out row has no copy among the others.

    progress: called with a file's name and its rows so far.
    The same seed gives the same rows in the same order. Encoded rows are kept as data.cache says.
    Raises DataError with every bad row of every file (the first ones in full) unless data.on_bad_row is skip; a file
    that is missing, cannot be read on or has no good row is an error in any case.
    """
    check_weights(section)
    section = without_skipped(section)
    train = [Source(file, "train", seed) for file in section.train]
    evaluated = [Source(file, "eval", seed) for file in section.eval]
    problems = [problem for file in (*train, *evaluated) for problem in file.encode(section, tokenizer, progress)]
    if problems:
        raise DataError(*problems)
    return _Mix(section, train, evaluated, seed).prepared()


def without_skipped(section: DataSection) -> DataSection:
    """The section without files that are left out. DataError when no training file is left."""
    kept = {name: tuple(file for file in getattr(section, name) if not file.skip) for name in ("train", "eval")}
    if not kept["train"]:
        raise DataError(Problem("data.train", "has no file that is not skipped", "remove `skip: true` from one"))
    return section.model_copy(update=kept)


def check_weights(section: DataSection) -> None:
    """Weights are for every training file or for none, and for no held-out file."""
    weighted = [file.weight is not None for file in section.train if not file.skip]
    problems = [
        Problem(
            f"data.train.{index}.weight", "is missing, but other files have one", "give every file a weight, or none"
        )
        for index, file in enumerate(section.train)
        if any(weighted) and file.weight is None and not file.skip
    ]
    hint = "remove the weight: every held-out row is looked at once"
    problems += [
        Problem(f"data.eval.{index}.weight", "means nothing for held-out rows", hint, file.weight)
        for index, file in enumerate(section.eval)
        if file.weight not in (None, 1)
    ]
    if problems:
        raise DataError(*problems)


class _Mix:
    """Chooses rows of encoded files; a row is its index in all files joined, those to train on first."""

    def __init__(self, section: DataSection, train: list[Source], evaluated: list[Source], seed: int) -> None:
        self.section, self.seed = section, seed
        self.num_train_files = len(train)
        self.files = [*train, *evaluated]
        stores = [file.store for file in self.files]
        self.starts = np.cumsum([0, *map(len, stores)])
        self.table = join(stores)
        self.hashes = _joined([store.hashes for store in stores])
        self.lengths = _joined([store.lengths for store in stores])
        self.loss_tokens = _joined([store.loss_tokens for store in stores])
        self.places = np.empty((self.starts[-1], 3), np.int32)
        for source, (store, begin) in enumerate(zip(stores, self.starts, strict=False)):
            here = self.places[begin : begin + len(store)]
            here[:, 0], here[:, 1], here[:, 2] = source, store.numbers, store.parts

    def prepared(self) -> Prepared:
        pool = self._pool()
        if self.section.eval:
            kept, evaluated = pool, np.arange(self.starts[self.num_train_files], self.starts[-1])
        else:
            left, out = hold_out(self.hashes[pool], self.section.eval_fraction)
            kept, evaluated = pool[left], pool[out]
        if not len(kept):
            hint = "lower data.eval_fraction, or add rows that differ"
            raise DataError(
                Problem("data.eval_fraction", "leaves no row to train on", hint, self.section.eval_fraction)
            )
        drawn = self._shuffled(kept)
        also_trained = int(np.isin(self.hashes[evaluated], self.hashes[drawn]).sum()) if len(evaluated) else 0
        report = PrepareReport(
            [file.report for file in self.files],
            self.section.max_length,
            self.section.packing,
            self._split_report(drawn),
            self._split_report(evaluated) if len(evaluated) else None,
            also_trained,
            self.section.loss_on,
        )
        eval_rows = self._select(evaluated) if len(evaluated) else None
        return Prepared(self._select(drawn), eval_rows, report, self.places[drawn], self.places[evaluated])

    def _pool(self) -> NDArray[np.int64]:
        """The rows that are drawn, in the order of the files."""
        files = self.files[: self.num_train_files]
        counts = draw_counts([len(file.store) for file in files], [file.file.weight for file in files])
        parts = []
        for index, (file, count) in enumerate(zip(files, counts, strict=True)):
            rng = np.random.default_rng([self.seed, 1, index])
            parts.append(self.starts[index] + choose(len(file.store), count, rng))
            file.report.unused = len(file.store) - count
        return _joined(parts)

    def _shuffled(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        for index, file in enumerate(self.files[: self.num_train_files]):
            file.report.drawn = int(np.count_nonzero(self.places[rows, 0] == index))
        return np.random.default_rng([self.seed, 2]).permutation(rows) if self.section.shuffle else rows

    def _split_report(self, rows: NDArray[np.int64]) -> SplitReport:
        lengths = self.lengths[rows]
        tokens, loss_tokens = int(lengths.sum()), int(self.loss_tokens[rows].sum())
        if not self.section.packing:
            return SplitReport(len(rows), tokens, loss_tokens, len(rows), 1.0)
        blocks = count_blocks(map(int, lengths), self.section.max_length)
        return SplitReport(len(rows), tokens, loss_tokens, blocks, tokens / (blocks * self.section.max_length))

    def _select(self, rows: NDArray[np.int64]) -> datasets.Dataset:
        """The rows as a data set, whose fingerprint is its content: nothing stale is ever found by it."""
        import datasets
        import pyarrow as pa  # type: ignore[import-untyped]
        from datasets.table import InMemoryTable

        digest = blake2b(self.hashes[rows].data, digest_size=8)
        digest.update(self.loss_tokens[rows].astype(np.int64).data)
        indices = pa.table({"indices": pa.array(rows.astype(np.uint64))})
        return datasets.Dataset(self.table, indices_table=InMemoryTable(indices), fingerprint=digest.hexdigest())


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """One array of several, which is that one where there are no others."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
