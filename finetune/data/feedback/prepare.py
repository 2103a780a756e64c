"""The walk of rows with feedback: files -> rows -> tokens -> a mix to train on and rows held out by their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.objectives import RowKind
from finetune.config.schema import DataFile, DataSection
from finetune.data.bad_rows import BadRow, BadRows
from finetune.data.columns import template_of
from finetune.data.dataset import Prepared, check_weights, without_skipped
from finetune.data.encode import Encoding, OverLong
from finetune.data.feedback.report import FeedbackFileReport, FeedbackReport, Findings
from finetune.data.feedback.store import FeedbackStore
from finetune.data.feedback.tokens import EncodedFeedback, FeedbackEncoder
from finetune.data.markers import Markers
from finetune.data.mix import choose, draw_counts
from finetune.data.prepare_report import SplitReport
from finetune.data.rows import Row, read_rows
from finetune.data.source import ROWS_AT_ONCE, Progress, batches
from finetune.data.templates import FeedbackTemplate
from finetune.data.unread import unread_problem
from finetune.errors import DataError, Problem

if TYPE_CHECKING:
    import datasets

Indices = NDArray[np.int64]


def prepare_feedback(
    section: DataSection, kind: RowKind, tokenizer: Any, *, seed: int, progress: Progress | None = None
) -> Prepared:
    """Read, encode, mix, shuffle and split rows of a kind other than supervised; otherwise as `dataset.prepare`.

    The data sets have the columns of `FeedbackStore.chunks`. `eval_fraction` is a share of the prompts, and all rows
    of a prompt are on one side.
    """
    check_weights(section)
    section = without_skipped(section)
    files = [_File(file, use, kind, seed) for use in ("train", "eval") for file in getattr(section, use)]
    problems = [problem for file in files for problem in file.encode(section, tokenizer, progress)]
    if problems:
        raise DataError(*problems)
    return _Mix(section, kind, files, seed, chat_model=bool(tokenizer.chat_template)).prepared()


class _File:
    """One file on its way to tokens."""

    def __init__(self, file: DataFile, use: str, kind: RowKind, seed: int) -> None:
        self.file, self.kind = file, kind
        self.report = FeedbackFileReport(file.path, "", use, file.weight)
        self.store = FeedbackStore(kind, seed)

    def encode(self, section: DataSection, tokenizer: Any, progress: Progress | None) -> Sequence[Problem]:
        """Fill store and report; the problems that must stop the run."""
        bad = BadRows(skip=section.on_bad_row == "skip")
        named = section.answers
        answers = Markers(named.begin, named.end) if named else None
        encoding = Encoding(section.max_length, section.over_long, section.loss_on, section.train_empty_think, answers)
        try:
            template = template_of(self.file, section, self.kind)
            assert isinstance(template, FeedbackTemplate)
            self.report.template = template.name
            encoder = FeedbackEncoder(tokenizer, template, encoding)
            for rows in batches(read_rows(self.file, bad, self.report.remarks.append), ROWS_AT_ONCE):
                for row, found in zip(rows, encoder.encode(rows), strict=True):
                    self._take(row, found, bad)
                if progress is not None:
                    progress(self.file.path, self.report.kept + len(bad))
        except DataError as error:
            return [*bad.listing(self.file.path, good=self.report.kept), *error.problems]
        self.report.read = self.report.kept + len(bad)
        self.report.skipped = dict(bad.reasons)
        if bad.stop:
            return bad.listing(self.file.path, good=self.report.kept)
        if not self.report.kept:
            total = Problem(self.file.path, f"has no good row: all {len(bad):,} are bad", "the first ones follow")
            return [total, *bad.listing(self.file.path, good=0, skipped_too=True)[:3]]
        if self.report.unread and section.unread == "error":
            return [unread_problem(self.file.path, self.report.unread)]
        return []

    def _take(self, row: Row, found: EncodedFeedback | BadRow, bad: BadRows) -> None:
        if isinstance(found, BadRow):
            self.report.over_long += isinstance(found, OverLong)
            bad.add(row.where, found)
            return
        self.report.add_feedback(row.where, found)
        parts = self.report.parts
        if not parts or parts[-1] != row.source:
            parts.append(row.source)
        self.store.add(row, found, len(parts) - 1)


class _Mix:
    """Chooses rows of encoded files; a row is its index in all files joined, those to train on first."""

    def __init__(self, section: DataSection, kind: RowKind, files: list[_File], seed: int, *, chat_model: bool) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        self.section, self.kind, self.files, self.seed, self.chat_model = section, kind, files, seed, chat_model
        self.train_files = [file for file in files if file.report.use == "train"]
        self.starts = np.cumsum([0, *(len(file.store) for file in files)])
        self.table = pa.concat_tables([chunk for file in files for chunk in file.store.chunks()])
        sources = np.repeat(np.arange(len(files)), np.diff(self.starts))
        self.places = np.stack([sources, self._column("number"), self._column("part")], axis=1)
        self.prompts, self.rows = self._hashes("prompt"), self._hashes("row")

    def _column(self, name: str) -> Indices:
        return np.concatenate([file.store.column(name) for file in self.files])

    def _hashes(self, name: str) -> NDArray[np.uint64]:
        return np.concatenate([file.store.hashes(name) for file in self.files])

    def prepared(self) -> Prepared:
        pool = self._pool()
        if self.section.eval:
            kept, evaluated = pool, np.arange(self.starts[len(self.train_files)], self.starts[-1])
        else:
            out = held_out(self.prompts[pool], self.section.eval_fraction)
            kept, evaluated = pool[~out], pool[out]
        if not len(kept):
            hint = "lower data.eval_fraction, or add rows with other prompts"
            what = "leaves no row to train on"
            raise DataError(Problem("data.eval_fraction", what, hint, self.section.eval_fraction))
        for index, file in enumerate(self.train_files):
            file.report.drawn = int(np.count_nonzero(self.places[kept, 0] == index))
        drawn = np.random.default_rng([self.seed, 2]).permutation(kept) if self.section.shuffle else kept
        report = FeedbackReport(
            [file.report for file in self.files],
            self.section.max_length,
            False,
            self._split(drawn),
            self._split(evaluated) if len(evaluated) else None,
            loss_on=self.section.loss_on,
            kind=self.kind,
            findings=self._findings(drawn),
            eval_prompts_trained=int(np.isin(self.prompts[evaluated], self.prompts[drawn]).sum()),
            chat_model=self.chat_model,
        )
        eval_rows = self._select(evaluated) if len(evaluated) else None
        return Prepared(self._select(drawn), eval_rows, report, self.places[drawn], self.places[evaluated])

    def _pool(self) -> Indices:
        """The rows that are drawn, in the order of the files."""
        counts = draw_counts(
            [len(file.store) for file in self.train_files], [file.file.weight for file in self.train_files]
        )
        parts = []
        for index, (file, count) in enumerate(zip(self.train_files, counts, strict=True)):
            rng = np.random.default_rng([self.seed, 1, index])
            parts.append(self.starts[index] + choose(len(file.store), count, rng))
            file.report.unused = len(file.store) - count
        return np.concatenate(parts)

    def _split(self, rows: Indices) -> SplitReport:
        tokens, loss_tokens = (int(self._column(name)[rows].sum()) for name in ("tokens", "loss_tokens"))
        return SplitReport(len(rows), tokens, loss_tokens, len(rows), 1.0)

    def _findings(self, rows: Indices) -> Findings:
        found = self.rows[rows]
        duplicates = len(found) - len(np.unique(found))
        if self.kind == "preference":
            chosen, rejected = (self._column(name)[rows] for name in ("chosen", "rejected"))
            return Findings(
                duplicates,
                int(np.isin(self._hashes("swapped")[rows], found).sum()),
                float((chosen > rejected).mean()),
                float((rejected > chosen).mean()),
                float(chosen.mean()),
                float(rejected.mean()),
            )
        if self.kind == "labeled":
            labels, answers = self._column("label")[rows].astype(bool), self._hashes("unlabeled")[rows]
            contradicted = np.intersect1d(answers[labels], answers[~labels])
            return Findings(duplicates, int(np.isin(answers, contradicted).sum()), good=float(labels.mean()))
        return Findings(duplicates)

    def _select(self, rows: Indices) -> datasets.Dataset:
        """The rows as a data set in memory, whose fingerprint is its content: nothing stale is ever found by it."""
        import datasets

        digest = blake2b(self.rows[rows].tobytes(), digest_size=8)
        digest.update(self._column("loss_tokens")[rows].tobytes())
        whole = datasets.Dataset(self.table, fingerprint=digest.hexdigest())
        return whole.select(rows, keep_in_memory=True, new_fingerprint=digest.hexdigest())


def held_out(prompts: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which rows are held out: all rows of a share of the prompts, which are ranked by their keyed hash."""
    unique = np.unique(prompts)
    count = max(1, round(fraction * len(unique))) if fraction > 0 else 0
    if not count:
        return np.zeros(len(prompts), bool)
    held: NDArray[np.bool_] = prompts <= unique[count - 1]
    return held
